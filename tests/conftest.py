"""What all tests share: failed asserts in the battery show their values."""

import pytest

pytest.register_assert_rewrite("battery")
