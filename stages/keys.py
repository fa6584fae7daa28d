"""Print every config key with its default and its sentence; `make keys`."""

from midasheng.config import keys_table

if __name__ == "__main__":
    print(keys_table())
