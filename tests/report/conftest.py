from support.made_runs import hurried_runs, made_run, run_folder, tool, uniform_run

__all__ = ["hurried_runs", "made_run", "run_folder", "tool", "uniform_run"]
