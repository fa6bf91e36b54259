//! Lease records, as the holder of a lock writes them.

use serde_json::{Value, json};

use super::cloud::cloud;
use super::test_env::{Lock, TestEnv, lock_json};

/// The ID of the lock that [`TestEnv::lock_with_lease`] creates.
pub const LEASED: &str = "33333333-2222-3333-4444-555555555555";

/// Returns a record that was renewed `age` seconds ago, of a lease of `length` seconds.
pub fn record(age: i64, length: u64) -> Value {
    json!({
        "v": 1, "lock": LEASED, "renewed": jiff::Timestamp::now().as_second() - age, "beat": 7, "keeper": 9,
        "lease": length, "fence": "stop", "region": "us-east-1", "tf": "0.1.0",
        "holder": { "user": "runner", "host": "fv-az1", "ci": "GitHub Actions", "job": "https://ci.example/job/7" },
    })
}

/// Returns the DynamoDB attribute value with the content of `value`.
fn attribute(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            json!({ "M": members.iter().map(|(name, value)| (name.clone(), attribute(value))).collect::<serde_json::Map<_, _>>() })
        }
        Value::Number(number) => json!({ "N": number.to_string() }),
        Value::String(text) => json!({ "S": text }),
        other => panic!("no record contains {other}"),
    }
}

impl TestEnv {
    /// Creates the lock of a run on another host, with `record` as its lease record.
    pub fn lock_with_lease(&self, record: &Value) {
        let mut info: Value = serde_json::from_str(&lock_json(LEASED, &self.path())).unwrap();
        info["Who"] = "runner@fv-az1".into();
        self.put_lease(&info.to_string(), record);
    }

    /// Writes a lock with the text `info` and the lease record `record`, as a renewal does.
    pub fn put_lease(&self, info: &str, record: &Value) {
        if self.lock != Lock::File {
            let item = json!({ "LockID": { "S": self.path() }, "Info": { "S": info }, "tf": attribute(record) });
            cloud().dynamodb("PutItem", &json!({ "TableName": self.table, "Item": item }));
        }
        let object = match self.lock {
            Lock::DynamoDb => return,
            Lock::File => format!("{},\"tf\":{record}}}", info.strip_suffix('}').unwrap()),
            Lock::Both => info.to_owned(),
        };
        cloud().s3("PUT", &format!("{}.tflock", self.path()), object.as_bytes());
    }
}
