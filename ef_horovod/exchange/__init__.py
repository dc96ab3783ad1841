"""How the messages of all ranks meet: one file an exchange, and the channel that runs on them.

gather       every rank gets every message: for any compressor; the cost grows with the ranks
reduce       values are summed in flight: for linear compressors; the cost does not grow
dense        an allreduce of the gradient itself, without payloads
double_pass  every rank is the server of one slice: messages for slices by an all-to-all, answers
             by an all-gather; for any compressor, the cost does not grow
server       one message to a parameter server and one answer, which it has reduced
"""

from ef_horovod.exchange import gather, reduce, dense, double_pass, server  # noqa: F401, I001 - registers them, in the order in which they are listed
