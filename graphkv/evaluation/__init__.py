"""How well a model answers from an evicted cache: ``graphkv eval``.

A run is a folder of two files.

``records.jsonl`` has one line per example, where an example is one question to one prompt in one mode, under one policy
at one budget. Lines are only ever appended. See `Record` for every field; the important ones are

=============  =======================================================================================================
key            unique name of the line: prompt, question, mode, policy, budget and sinks, joined by ``|``
prompt         name of the prompt: the pairing unit of every comparison
task, kind     what was asked
mode           ``"aware"``: the question was in the cache when it was evicted; ``"agnostic"``: it was not
policy         ``"full"``, or a name such as ``"snapkv"``, ``"snapkv+graphkv"``, ``"snapkv+degree"``
budget         tokens kept per KV head in the average layer; null for ``"full"``
nll            mean negative log-likelihood per token of the right answer, in nats: lower is better
kl             mean KL divergence of the next-token distributions at the answer's places, full cache to evicted, in nats
match          whether greedy decoding gives the right answer, token by token
score          the task's metric of the generated text, in [0, 1]: higher is better; null where nothing was generated
=============  =======================================================================================================

``run.json`` says what the run is: the configuration, SHA-256 of model and text, and for every session that worked on it
versions, commit, machine and time. Records hold nothing that changes from run to run, so equal seeds give equal files.
"""
