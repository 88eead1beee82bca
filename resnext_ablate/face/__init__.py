"""The commands, what they answer and how it is printed."""
