"""A cluster of virtual hosts on one machine, with networks as slow as one likes.

    launch/cluster --hosts 2 --rate 100mbit -- horovodrun -np 2 -H node1:1,node2:1 python train.py

A host is a set of Linux namespaces with an interface `eth0`; token buckets limit what goes in and
out. `docs/cluster.md` tells how it works. Only root can make one.
"""
