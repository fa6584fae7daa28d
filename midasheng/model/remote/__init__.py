"""What travels with an exported model: three files of code, and the script that proves it in a fresh process."""
