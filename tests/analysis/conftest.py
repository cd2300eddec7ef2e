from support.made_runs import hurried_runs, made_run, run_folder, tool

__all__ = ["hurried_runs", "made_run", "run_folder", "tool"]
