"""Exchanges, one per file, and the channel that uses them.

gather       all-gather of the payloads; any compressor; the cost grows with the number of ranks
reduce       allreduce of the payloads' values; linear compressors; the cost does not grow
dense        allreduce of the gradient itself, without payloads
double_pass  each rank is the server of one slice: all-to-all of the slices' payloads, then
             all-gather of the answers; any compressor; the cost does not grow
server       one payload to a parameter server, and one reduced answer back
hierarchical sums within a node of several ranks, and one of the others between nodes
"""

from ef_horovod.exchange import gather, reduce, dense, double_pass, server, hierarchical  # noqa: F401, I001 - registers them, in the order in which they are listed
