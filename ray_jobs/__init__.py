"""Thin entry points for `ray job submit --working-dir . -- python -m ray_jobs.<name>`.

Run them as modules: `python ray_jobs/x.py` would put this folder first on `sys.path`.
"""
