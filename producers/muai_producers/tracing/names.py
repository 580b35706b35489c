"""Every name that a span or one of its attributes has, in one table: the specification's and OpenTelemetry's.

OpenTelemetry's conventions for generative models and for messaging are still in development; when they change, this
file does. `docs/tracing.md` shows the tree.
"""

from __future__ import annotations

from typing import Final

SCOPE: Final = "muai"

# -- spans -------------------------------------------------------------------------------------------------------------
REQUEST: Final = "request"
ADMISSION: Final = "admission"
ROUTING: Final = "routing"
BATCHING: Final = "batching"
WORKFLOW_EXECUTION: Final = "workflow_execution"
PREPROCESSING: Final = "preprocessing"
INFERENCE: Final = "inference"
MODEL_LOADING: Final = "model_loading"
FORWARD_PASS: Final = "forward_pass"
POSTPROCESSING: Final = "postprocessing"
RESPONSE_FORMATTING: Final = "response_formatting"
DELIVERY: Final = "delivery"
BATCH: Final = "batch"

# -- attributes of the specification -----------------------------------------------------------------------------------
REQUEST_ID: Final = "request_id"
WORKFLOW_TYPE: Final = "workflow_type"
USER_ID: Final = "user_id"
MODEL_NAME: Final = "model_name"
ENGINE: Final = "engine"
BATCH_SIZE: Final = "batch_size"
SEQUENCE_LENGTH: Final = "sequence_length"
ERROR_TYPE: Final = "error_type"
ERROR_MESSAGE: Final = "error_message"
STACK_TRACE: Final = "stack_trace"

# -- attributes of our own ---------------------------------------------------------------------------------------------
BATCH_ID: Final = "muai.batch.id"
ATTEMPT: Final = "muai.attempt"
"""1 for the first engine that a request is tried on."""
CHAIN: Final = "muai.chain"
STATE: Final = "muai.state"
ERROR_CODE: Final = "muai.error.code"
RETRYABLE: Final = "muai.error.retryable"
PRIORITY: Final = "muai.priority"
CACHE_HIT: Final = "muai.cache_hit"
WORKER: Final = "muai.worker"
GPU: Final = "muai.gpu"
STEP: Final = "muai.workflow.step"
EARLIER_REQUEST: Final = "muai.earlier_request_id"
REFUSED: Final = "REFUSED"
"""`muai.state` of a request that was never accepted."""
KNOWN: Final = "KNOWN"
"""`muai.state` of one whose idempotency key belongs to an earlier request, which is the one that was answered."""

# -- OpenTelemetry: errors, HTTP, generative models, messaging ---------------------------------------------------------
OTEL_ERROR_TYPE: Final = "error.type"
EXCEPTION: Final = "exception"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACKTRACE: Final = "exception.stacktrace"
HTTP_METHOD: Final = "http.request.method"
HTTP_STATUS: Final = "http.response.status_code"
HTTP_ROUTE: Final = "http.route"
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_MODEL: Final = "gen_ai.request.model"
GEN_AI_CONVERSATION: Final = "gen_ai.conversation.id"
GEN_AI_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION: Final = "messaging.operation.type"
MESSAGING_DESTINATION: Final = "messaging.destination.name"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"
MESSAGING_MESSAGE_COUNT: Final = "messaging.batch.message_count"

GEN_AI_OPERATIONS: Final = {
    "text-generation": "text_completion",
    "summarization": "text_completion",
    "chat": "chat",
    "embedding": "embeddings",
    "text-classification": "text_classification",
}
"""`gen_ai.operation.name` by task; the last is not among OpenTelemetry's own, which allow others."""
