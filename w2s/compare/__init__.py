"""Run folders in; a verdict, a table, a page and curves out: `python -m w2s.compare`."""
