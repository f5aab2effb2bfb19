"""Patches verl on import, for `VERL_USE_EXTERNAL_MODULES=sppo_kernels.integrations.verl_auto`.

verl imports the modules of that variable in the driver and in every worker. η comes from the
variable SPPO_KERNELS_ETA; without it only the head is replaced.
"""

from __future__ import annotations

import os

from sppo_kernels.integrations import verl

_eta = os.environ.get("SPPO_KERNELS_ETA")
verl.patch(eta=None if _eta is None else float(_eta))
