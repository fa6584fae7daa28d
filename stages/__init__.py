"""One file per verb of the Makefile: its contract, then one call into the library."""
