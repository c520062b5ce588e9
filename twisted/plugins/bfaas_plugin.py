"""The twistd commands. Each names its module as a string, so that nothing is imported until it is chosen."""

from twisted.application.service import ServiceMaker

coord = ServiceMaker(
    "bfaas coordinator", "bfaas.coord", "Take scripts from anyone and run them on workers.", "bfaas-coord"
)
basher = ServiceMaker(
    "bfaas worker", "bfaas.basher", "Run one authenticated bash script, then end.", "bfaas-basher"
)
machines = ServiceMaker(
    "bfaas machines", "bfaas.machines.server", "Stand in for Fly on this host.", "bfaas-machines"
)
