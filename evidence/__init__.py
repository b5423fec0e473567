"""What an adapter does on a real model: calibration statistics, scores, sweeps, reports, whole libraries.

The only folder that runs models (with transformers, an extra) or many adapters at once; everything else works on
values alone.
"""
