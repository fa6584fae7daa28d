"""Bytes -> Pack: manifests, index, plan, decoding, chat, loader, ledger."""
