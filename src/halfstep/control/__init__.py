"""Judgement: from measurements to plans, and observers that measure. Nothing here trains."""
