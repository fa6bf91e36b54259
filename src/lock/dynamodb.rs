//! The half of a lock in a DynamoDB table: an item whose `LockID` is the lock's path and whose `InfoAttribute` is its JSON
//! (backend/remote-state/s3/client.go, `lockWithDynamoDB`).

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::operation::delete_item::DeleteItemError;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::{AttributeValue, MultiRegionConsistency, ProvisionedThroughputDescription};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::AfterDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;

use super::deleted::Deleted;
use crate::aws::failure::{Failure, NoAnswer};
use crate::terraform::backend::CachedBackend;

/// A client for the table of `backend`.
pub(crate) fn client(backend: &CachedBackend, config: &aws_config::SdkConfig) -> Client {
    let mut builder = aws_sdk_dynamodb::config::Builder::from(config);
    let endpoint = crate::aws::settings::endpoint(
        backend,
        ["endpoints.dynamodb", "dynamodb_endpoint"],
        ["AWS_ENDPOINT_URL_DYNAMODB", "AWS_DYNAMODB_ENDPOINT"],
    );
    if let Some(endpoint) = endpoint {
        builder = builder.endpoint_url(endpoint).use_fips(false).use_dual_stack(false);
    }
    Client::from_conf(builder.interceptor(AnswersOnly).build())
}

/// Rejects a response with a success status that DynamoDB cannot have sent. The SDK reads an empty body as `{}`, which
/// means "no such item" for a `GetItem` and "deleted" for a `DeleteItem`; a proxy or a captive portal sends such bodies.
#[derive(Debug)]
struct AnswersOnly;

#[dyn_dispatch_hint]
impl Intercept for AnswersOnly {
    fn name(&self) -> &'static str {
        "AnswersOnly"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response();
        if !response.status().is_success() || response.body().bytes().is_some_and(is_an_answer) {
            return Ok(());
        }
        Err(NoAnswer { service: SERVICE, status: response.status().as_u16() }.into())
    }
}

const SERVICE: &str = "DynamoDB";

/// Whether `body` can be the body of a successful response: a JSON object whose members begin with a capital, as all
/// members of all responses do (`Item`, `Attributes`, `ConsumedCapacity`; DynamoDB API reference).
fn is_an_answer(body: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(body)
        .is_ok_and(|members| members.keys().all(|name| name.starts_with(|first: char| first.is_ascii_uppercase())))
}

/// The `InfoAttribute` of an item, byte for byte: what a delete of the item depends on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum InfoAttribute {
    /// The text of a lock, most likely.
    Text(String),
    /// Of another type than a string.
    Other(AttributeValue),
    /// The item has none.
    None,
}

impl InfoAttribute {
    fn of(value: Option<AttributeValue>) -> Self {
        match value {
            Some(AttributeValue::S(text)) => Self::Text(text),
            Some(other) => Self::Other(other),
            None => Self::None,
        }
    }

    /// The text; empty for anything else.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Other(_) | Self::None => "",
        }
    }
}

/// Reads the `InfoAttribute` of the item as it is now (a consistent read). `None` when there is no such item.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn read(client: &Client, table: &str, path: &str) -> Result<Option<InfoAttribute>, Failure> {
    Ok(attribute(client, table, path, "Info").await?.map(InfoAttribute::of))
}

/// The MD5 of the state that terraform wrote last, in an item beside the lock (client.go, `putMD5`).
///
/// # Errors
/// [`Failure`].
pub(crate) async fn digest(client: &Client, table: &str, path: &str) -> Result<Option<String>, Failure> {
    let digest = attribute(client, table, &format!("{path}-md5"), "Digest").await?.flatten();
    Ok(digest.and_then(|value| value.as_s().ok().cloned()))
}

/// The attribute `name` of an item: the outer `None` for no item, the inner for no such attribute.
async fn attribute(
    client: &Client,
    table: &str,
    path: &str,
    name: &str,
) -> Result<Option<Option<AttributeValue>>, Failure> {
    let answer = client
        .get_item()
        .table_name(table)
        .key("LockID", AttributeValue::S(path.to_owned()))
        .projection_expression("LockID, #name")
        .expression_attribute_names("#name", name)
        .consistent_read(true)
        .send()
        .await
        .map_err(|error| failure("dynamodb:GetItem", &error))?;
    Ok(answer.item.map(|mut item| item.remove(name)))
}

/// What a table is, as far as it matters to whoever reads all of it.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    /// Its partition key, and its sort key if it has one.
    pub(crate) keys: Vec<String>,
    /// The read capacity units that were provisioned; none for a table that is paid for by request.
    pub(crate) read_capacity: Option<i64>,
    /// About so many items are in it, as of some hours ago.
    pub(crate) items: Option<i64>,
    /// The regions that it is replicated to.
    pub(crate) replicas: Vec<String>,
    /// Its replicas agree before a write is answered (a global table with multi-region strong consistency).
    pub(crate) strong: bool,
}

impl Description {
    /// Whether a condition holds in the region that is asked, and nowhere else: of two writes in two regions the later
    /// stays, whatever each of them found.
    pub(crate) fn last_writer_wins(&self) -> bool {
        !self.replicas.is_empty() && !self.strong
    }
}

/// Describes a table.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn describe(client: &Client, table: &str) -> Result<Description, Failure> {
    let answer = client
        .describe_table()
        .table_name(table)
        .send()
        .await
        .map_err(|error| failure("dynamodb:DescribeTable", &error))?;
    // Every table has a key. A response that describes none is a proxy's.
    let table = answer.table.filter(|table| !table.key_schema().is_empty());
    let table = table.ok_or_else(|| Failure::no_answer(SERVICE, "the response describes no table"))?;
    let provisioned = table.provisioned_throughput().and_then(ProvisionedThroughputDescription::read_capacity_units);
    Ok(Description {
        keys: table.key_schema().iter().map(|key| key.attribute_name.clone()).collect(),
        // By request: 0.
        read_capacity: provisioned.filter(|units| *units > 0),
        items: table.item_count(),
        replicas: table.replicas().iter().filter_map(|replica| replica.region_name.clone()).collect(),
        strong: table.multi_region_consistency() == Some(&MultiRegionConsistency::Strong),
    })
}

/// One page of a table.
#[derive(Debug, Default)]
pub(crate) struct TablePage {
    /// `LockID` and `InfoAttribute` of what is no digest.
    pub(crate) items: Vec<(String, InfoAttribute)>,
    /// So many items were looked at for it.
    pub(crate) scanned: u64,
    /// And so many read capacity units were used, where the service tells.
    pub(crate) consumed: Option<f64>,
    /// Where the next begins. None: this was the last.
    pub(crate) next: Option<std::collections::HashMap<String, AttributeValue>>,
}

/// Reads the next page of one of `segments` parts of a table, eventually consistent, which costs half.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn scan(
    client: &Client,
    table: &str,
    (segment, segments): (i32, i32),
    limit: Option<i32>,
    from: Option<std::collections::HashMap<String, AttributeValue>>,
) -> Result<TablePage, Failure> {
    let answer = client
        .scan()
        .table_name(table)
        .segment(segment)
        .total_segments(segments)
        .set_limit(limit)
        .set_exclusive_start_key(from)
        .projection_expression("LockID, #info")
        // The digests of states stand in the same table, and are most of it.
        .filter_expression("attribute_exists(#info) OR attribute_not_exists(Digest)")
        .expression_attribute_names("#info", "Info")
        .return_consumed_capacity(aws_sdk_dynamodb::types::ReturnConsumedCapacity::Total)
        .send()
        .await
        .map_err(|error| failure("dynamodb:Scan", &error))?;
    let items = answer.items.unwrap_or_default().into_iter().map(|mut item| {
        let text = |value: AttributeValue| match value {
            AttributeValue::S(text) => Some(text),
            _ => None,
        };
        let info = InfoAttribute::of(item.remove("Info"));
        (item.remove("LockID").and_then(text).unwrap_or_default(), info)
    });
    Ok(TablePage {
        items: items.collect(),
        scanned: answer.scanned_count.try_into().unwrap_or(0),
        consumed: answer.consumed_capacity.and_then(|consumed| consumed.capacity_units),
        next: answer.last_evaluated_key.filter(|key| !key.is_empty()),
    })
}

/// Puts a lock there if nothing is there, as terraform does. False when something is.
///
/// # Errors
/// [`Failure`]; the lock may have been put all the same.
pub(crate) async fn put_if_absent(client: &Client, table: &str, path: &str, info: &str) -> Result<bool, Failure> {
    let answer = client
        .put_item()
        .table_name(table)
        .item("LockID", AttributeValue::S(path.to_owned()))
        .item("Info", AttributeValue::S(info.to_owned()))
        .condition_expression("attribute_not_exists(LockID)")
        .send()
        .await;
    written(answer.map(drop))
}

/// Writes the digest of the state at `path` on condition that it is `old`. False when it is another one.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn replace_digest(
    client: &Client,
    table: &str,
    path: &str,
    old: &str,
    new: &str,
) -> Result<bool, Failure> {
    let answer = client
        .put_item()
        .table_name(table)
        .item("LockID", AttributeValue::S(format!("{path}-md5")))
        .item("Digest", AttributeValue::S(new.to_owned()))
        .condition_expression("Digest = :old")
        .expression_attribute_values(":old", AttributeValue::S(old.to_owned()))
        .send()
        .await;
    written(answer.map(drop))
}

/// Deletes the digest of the state at `path` on condition that it is `old`. False when it is another one, or none.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn delete_digest(client: &Client, table: &str, path: &str, old: &str) -> Result<bool, Failure> {
    let request = client
        .delete_item()
        .table_name(table)
        .key("LockID", AttributeValue::S(format!("{path}-md5")))
        .condition_expression("Digest = :old")
        .expression_attribute_values(":old", AttributeValue::S(old.to_owned()));
    deleted(request.send().await).map(|deleted| deleted == Deleted::Yes)
}

fn written(answer: Result<(), SdkError<PutItemError>>) -> Result<bool, Failure> {
    match answer {
        Ok(()) => Ok(true),
        Err(error) if error.as_service_error().is_some_and(PutItemError::is_conditional_check_failed_exception) => {
            Ok(false)
        }
        Err(error) => Err(failure("dynamodb:PutItem", &error)),
    }
}

/// Deletes the item on condition that its `InfoAttribute` is, byte for byte, the one that was read. Never `contains`: an empty
/// or partial ID matches that.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn delete(client: &Client, table: &str, path: &str, info: &InfoAttribute) -> Result<Deleted, Failure> {
    let request = client.delete_item().table_name(table).key("LockID", AttributeValue::S(path.to_owned()));
    let equals = |value: AttributeValue| {
        request.clone().condition_expression("Info = :info").expression_attribute_values(":info", value)
    };
    let request = match info {
        InfoAttribute::Text(text) => equals(AttributeValue::S(text.clone())),
        InfoAttribute::Other(value) => equals(value.clone()),
        InfoAttribute::None => {
            let condition = "attribute_exists(LockID) AND attribute_not_exists(Info)";
            request.clone().condition_expression(condition)
        }
    };
    deleted(request.send().await)
}

fn deleted<T>(answer: Result<T, SdkError<DeleteItemError>>) -> Result<Deleted, Failure> {
    match answer {
        Ok(_) => Ok(Deleted::Yes),
        Err(error) if error.as_service_error().is_some_and(DeleteItemError::is_conditional_check_failed_exception) => {
            Ok(Deleted::Changed)
        }
        Err(error) => Err(failure("dynamodb:DeleteItem", &error)),
    }
}

/// What went wrong with `action`, as a policy names it.
pub(super) fn failure<E>(action: &'static str, error: &SdkError<E>) -> Failure
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    Failure::of_request(SERVICE, action, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_json_object_of_dynamodbs_is_an_answer() {
        for body in [
            "{}",
            " {}\n",
            r#"{"Item":{"LockID":{"S":"a"},"Info":{"S":"{}"}}}"#,
            r#"{"ConsumedCapacity":{"TableName":"t","CapacityUnits":1.0}}"#,
            r#"{"Items":[],"Count":0,"ScannedCount":0}"#,
            r#"{"Table":{"TableName":"t"}}"#,
        ] {
            assert!(is_an_answer(body.as_bytes()), "{body}");
        }
        for body in [
            "",
            " ",
            "null",
            "[]",
            "\"\"",
            "<html><body>Sign in</body></html>",
            r#"{"error":"sign in first"}"#,
            r#"{"__type":"x","message":"y"}"#,
            "{}{}",
            "{\"Item\":",
        ] {
            assert!(!is_an_answer(body.as_bytes()), "{body}");
        }
    }
}
