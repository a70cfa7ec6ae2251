"""Speed, as ratios to the work that cannot be avoided.

``make bench`` measures everything, prints one table and writes ``results.json``, from which
``docs/performance.md`` is made. ``python -m benchmarks --only graph --rounds 5`` measures a part of it,
``--device cuda`` on a GPU, ``--list`` names all rows.

- Both sides of a row run in turns in one process, and the ratio is the median over the turns, so that a slow moment of
  a shared machine meets both.
- Extra peak memory is what the high-water mark of a fresh process rises by during one call, inputs and a first small
  call before. On a GPU it is what the allocator's peak rises by.
- The comparison with kvpress needs an environment that has it (``make .venv-kvpress``). Without, its rows say "not
  measured".

``python -m pytest benchmarks/test_speed.py`` gives the same calls to pytest-benchmark, for its statistics and its
comparison of saved runs.
"""
