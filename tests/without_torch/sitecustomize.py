"""Hides torch from the Pythons that tests start: users have none, and to import it takes as long as
everything else together."""

import sys

sys.modules["torch"] = None
