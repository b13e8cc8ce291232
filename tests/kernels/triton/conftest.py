"""Kernels in Triton's interpreter run in a process of their own.

TRITON_INTERPRET is read when a kernel and Triton's own library are decorated, so one process has
either the interpreter or the compiler. `test_interpreted.py` runs the folder `interpreted` in a
child process; here it is left out.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
