from importlib.util import find_spec


collect_ignore = []
if find_spec("lmms_eval") is None:
    collect_ignore += ["test_lmms.py", "test_metrics.py", "test_paper_table.py"]
if find_spec("vlmeval") is None:
    collect_ignore += ["test_vlmevalkit.py"]
