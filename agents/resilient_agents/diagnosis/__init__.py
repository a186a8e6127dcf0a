"""Diagnosis: what lines of text mean, and which of many facts is the cause. Pure: text and findings in, findings and incidents out."""
