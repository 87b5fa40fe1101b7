"""Quantization: number formats, scales, calibration, and what each linear site gets."""
