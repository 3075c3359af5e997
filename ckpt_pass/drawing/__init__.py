"""What pictures and tables share; knows no value of this library."""
