"""The conformance kit: how graphkv knows that a backend is right, for its own backends and for yours.

With ``pip install graphkv[testing]``, prove a backend in one line::

    pytest --pyargs graphkv.testing.suite --graphkv-backend mypkg.backend:BACKEND

or from a test module of your own, with a session-wide fixture that returns your value:

.. code-block:: python

    import pytest
    from graphkv.testing import label, variants
    from graphkv.testing.suite import *

    from mypkg.backend import BACKEND


    @pytest.fixture(scope="session", params=variants(BACKEND), ids=label)
    def backend(request):
        return request.param

==================  ===================================================================================
module              what it holds
==================  ===================================================================================
``suite``           the properties: plain functions with Hypothesis inputs over a ``backend`` fixture
``examples``        those of fixed inputs, at the sizes of real models; `suite` brings them along
``oracle``          the three steps as Python loops, one row and one edge at a time: the truth on values
``truth``           the same in whole NumPy arrays of float64, for rows too long for loops
``strategies``      Hypothesis strategies that draw NumPy arrays
``asserts``         comparisons of library, dtype, shape and device before values; the margin rule
``policies``        a policy whose importance is given, and one of each that graphkv ships
``namespace``       every name and keyword that is used of a library
``plugin``          the pytest option ``--graphkv-backend``
==================  ===================================================================================

Importing this package imports no array library and no test library.
"""

from .subject import Subject, describe, label, variants

__all__ = ["Subject", "describe", "label", "variants"]
