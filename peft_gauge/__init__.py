"""Instruments for measuring, predicting and comparing parameter-efficient fine-tuning."""

__version__ = "0.1.0"
