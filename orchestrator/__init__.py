"""Runs experiments with codetr on Ray and records them in MLflow."""
