"""What a refusal is, whoever refuses."""
import pytest


def refusal(call, *parts, kind=ValueError):
    """Assert that a call is refused in one line, not too long a one, that says all the parts."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert str(part) in message, message
