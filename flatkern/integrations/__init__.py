"""flatkern under other people's training loops."""
