"""Figures about noise, adapters and flatness in the logs of trainers; one module for each."""
