"""Graphs: what passes edit, analyse and write."""
