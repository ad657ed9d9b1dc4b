"""Reflection, in the version of today and in the one that older tools speak."""

from fusebox import PATIENCE_SECONDS, SERVICE, ServerCase
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)


class Reflection(ServerCase):
    def ask(self, version: str, **question: str) -> ServerReflectionResponse:
        # The messages of v1 are those of v1alpha, byte for byte; only the path differs.
        call = self.server.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )
        (answer,) = call(iter([ServerReflectionRequest(**question)]), timeout=PATIENCE_SECONDS)
        return answer

    def messages_beside(self, version: str, symbol: str) -> set[str]:
        answer = self.ask(version, file_containing_symbol=symbol)
        files = map(
            FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto
        )
        return {f"{file.package}.{message.name}" for file in files for message in file.message_type}

    def test_both_versions_list_the_services(self):
        for version in ["v1", "v1alpha"]:
            with self.subTest(version):
                answer = self.ask(version, list_services="")
                services = {service.name for service in answer.list_services_response.service}
                reflection = f"grpc.reflection.{version}.ServerReflection"
                self.assertLessEqual({SERVICE, "grpc.health.v1.Health", reflection}, services)

    def test_both_versions_serve_the_service_and_the_details_of_errors(self):
        for version in ["v1", "v1alpha"]:
            with self.subTest(version):
                self.assertIn("fusebox.v1.AcquireRequest", self.messages_beside(version, SERVICE))
                for detail in ["google.rpc.BadRequest", "google.rpc.ResourceInfo"]:
                    self.assertIn(detail, self.messages_beside(version, detail))
