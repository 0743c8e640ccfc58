"""What was tried against flatkern, as commands: docs/reliability.md has what they found."""
