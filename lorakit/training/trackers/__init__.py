"""Second places for a run's metrics, beside metrics.jsonl: one file for each tracker.

`report_to` names them. reporter.py hands each what the run logs, in a thread of its own, so that a
tracker that is slow, fails or cannot be reached neither stops nor slows the run.
"""
