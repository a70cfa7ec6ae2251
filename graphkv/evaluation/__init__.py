"""The evaluation of answers from evicted caches: ``graphkv eval``, ``report`` and ``tune``.

A run is a folder of two files.

``records.jsonl`` has one line per example, where an example is one question to one prompt in one mode, under one policy
at one budget. Lines are only ever appended. See `Record` for every field; the important ones are

=============  =======================================================================================================
key            unique name of the line: prompt, question, mode, policy, budget and sinks, joined by ``|``
prompt         name of the prompt: the pairing unit of every comparison
task, kind     kind of question, and of what was hidden
mode           ``"aware"``: the question was in the cache when it was evicted; ``"agnostic"``: it was not
policy         ``"full"``, or a name such as ``"snapkv"``, ``"snapkv+graphkv"``, ``"snapkv+degree"``
budget         tokens to keep per KV head in the average layer, as asked for; null for ``"full"``
tokens_kept    the same as measured; null in runs of schema 1, which did not measure it
cache_bytes    bytes of all stored keys and values as measured; null in runs of schema 1
nll            mean negative log-likelihood per token of the right answer, in nats: lower is better
kl             mean KL divergence of the next-token distributions at the answer's places, full cache to evicted, in nats
match          whether greedy decoding generates the right answer, token by token
score          the task's metric of the generated text, in [0, 1]: higher is better; null where nothing was generated
=============  =======================================================================================================

``run.json`` is the run's provenance: the configuration, SHA-256 of model and text, and for every session that worked on
it versions, commit, machine and time. Records hold nothing that changes from run to run, so equal seeds make equal
files.
"""
