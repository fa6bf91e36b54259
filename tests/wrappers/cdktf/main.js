// The same configuration as the other tools get, as a program for cdktf.
const { App, DataResource, S3Backend, TerraformOutput, TerraformStack } = require("cdktf");

const app = new App();
const stack = new TerraformStack(app, "prod");
new S3Backend(stack, { bucket: "bucket", key: process.env.STATE_KEY, region: "us-east-1", dynamodbTable: "locks" });
stack.addOverride("terraform.backend.s3.use_lockfile", true);
const command = process.env.PROVISIONER;
new DataResource(stack, "production", { provisioners: [{ type: "local-exec", command }] });
new TerraformOutput(stack, "answer", { value: 42 });
app.synth();
