"""The plan as a value: what was asked, decided, predicted; as text, picture and file."""
