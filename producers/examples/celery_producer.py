"""An existing Celery application that sends a request by name, knowing nothing of MuAI but the task and the queue.

Run it where the broker is: python celery_producer.py [MODEL [BROKER]]
"""

import sys

from celery import Celery


def main(model: str = "all-minilm-l6-v2", broker: str = "redis://127.0.0.1:6379/0") -> None:
    shop = Celery("shop", broker=broker, backend=broker)
    shop.conf.task_create_missing_queue_type = "quorum"  # as RabbitMQ has it; Redis knows no types
    request = {"model": model, "inputs": {"text": "How far is the moon?"}, "priority": 7}
    answer = shop.send_task("muai.infer", kwargs=request, queue="inference")
    result = answer.get(timeout=60)
    print(f"{answer.id}: {answer.state} by {result['engine_used']}, {sorted(result['outputs'])}")
    shop.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
