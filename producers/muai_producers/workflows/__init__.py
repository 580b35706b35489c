"""Workflows: several inference requests that together answer one question, in process or over the queue."""

from muai_producers.workflows.base import Step, Workflow
from muai_producers.workflows.chat import ChatGenerateWorkflow
from muai_producers.workflows.orchestrator import Orchestrator
from muai_producers.workflows.rag import IngestWorkflow, RAGQAWorkflow
from muai_producers.workflows.router import Route, Router
from muai_producers.workflows.search_qa import SearchQAWorkflow

__all__ = [
    "ChatGenerateWorkflow",
    "IngestWorkflow",
    "Orchestrator",
    "RAGQAWorkflow",
    "Route",
    "Router",
    "SearchQAWorkflow",
    "Step",
    "Workflow",
]
