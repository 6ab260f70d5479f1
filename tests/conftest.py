"What all tests share: no progress bars, no windows, and property tests that repeat."
import os

# Before anything imports tqdm or matplotlib, which read these once.
os.environ.setdefault('TQDM_DISABLE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

from hypothesis import settings

# The same examples on every run, so that a red build is a change of ours; no deadline, for shared machines stall.
settings.register_profile('drdna', derandomize=True, deadline=None)
settings.load_profile('drdna')
