"""Measurements; what compares engines fairly will grow here."""
