"""The library behind the three training stages; importing it brings in neither lightning nor webdataset."""

__version__ = "0.1.0"
