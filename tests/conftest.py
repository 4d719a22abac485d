"""For all tests: `prometheus_client` is imported before anything that imports Feast.

It decides when it is imported, once and for the whole process, whether its series live in the process or in files that workers share.
Feast, when it is imported, sets the variable that decides it. Were Feast first, two series of one name would be one in every test.
The servers are safe: they import Feast when they need it, long after their metrics.
"""

from __future__ import annotations

from prometheus_client import values

assert values.ValueClass is values.MutexValue, \
    "prometheus_client keeps its series in files: PROMETHEUS_MULTIPROC_DIR is set; unset it, or tests count what others counted"
