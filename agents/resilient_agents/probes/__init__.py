"""Probes: the senses of a node. One noun per file; a file is a pure parser and a thin reader."""
