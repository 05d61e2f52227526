"""Batches: JSONL in, JSONL out, at lower priority than everybody else, and never a line lost or doubled.

Reading order: ``records`` (what is kept), ``store`` (where: SQLite and a folder), ``validation`` (from a file to lines), ``runner``
(from lines to answers), ``inprocess`` (a line takes the way of an HTTP request), ``results`` (from answers to files), ``uploads`` and
``routes`` (/v1/files, /v1/batches), ``offline`` (`quire batch run`: the same without a port).

Why no line is lost or doubled: a line has no state but its answer. One transaction writes the answer, and counts it, where there is
none; what has no answer is run, again if need be, by whichever process has the store. Files of results are written from the answers,
whole, beside their place, and appear in the transaction that ends the batch. Everything here may be killed between any two statements.
"""
