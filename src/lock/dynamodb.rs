//! The DynamoDB part of a lock: an item whose `LockID` is the lock's path and whose `Info` attribute is the lock's JSON
//! (backend/remote-state/s3/client.go, `lockWithDynamoDB`).

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::operation::delete_item::DeleteItemError;
use aws_sdk_dynamodb::operation::delete_item::builders::DeleteItemFluentBuilder;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::{
    AttributeValue, MultiRegionConsistency, OnDemandThroughput, ProvisionedThroughputDescription, ReturnValue,
    TableDescription,
};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::AfterDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;
use aws_smithy_types::timeout::TimeoutConfig;
use jiff::Timestamp;
use serde_json::Value;

use super::attempts::Attempts;
use super::deleted::Deleted;
use super::scan_response::{ItemReader, ScannedAttributes, UseItems};
use super::service_time::ServiceTime;
use super::written::Written;
use crate::aws::failure::{Failure, NoAnswer};
use crate::json::MemberNames;
use crate::lease::info_field;
use crate::lease::record::{Claim, FIELD, MAX_BYTES as MAX_RECORD_BYTES, NotBelieved, Record};
use crate::terraform::backend::CachedBackend;
use crate::terraform::lock_info::LockInfo;

/// Returns a client for the table of `backend`.
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
/// means "no such item" for a `GetItem` and "deleted" for a `DeleteItem`. A proxy or a captive portal may send such a
/// body.
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

/// Whether `body` can be the body of a successful response: a JSON object in which the name of every member begins with
/// a capital letter, as in all responses (`Item`, `Attributes`, `ConsumedCapacity`; DynamoDB API reference). The values
/// are not stored, because the SDK has stored them once.
fn is_an_answer(body: &[u8]) -> bool {
    serde_json::from_slice::<MemberNames>(body).is_ok_and(|MemberNames(names)| {
        names.iter().all(|name| name.starts_with(|first: char| first.is_ascii_uppercase()))
    })
}

/// The `Info` attribute of an item, exactly as it was read. A delete of the item has the condition that this attribute
/// is unchanged.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum InfoAttribute {
    /// A string, most likely the text of a lock.
    Text(String),
    /// The text of a lock whose field `Info` says that the lock has a lease ([`info_field`]).
    Filled {
        /// The text that terraform wrote.
        text: String,
        /// The text that is stored.
        stored: String,
    },
    /// A value of another type.
    Other(AttributeValue),
    /// The item has no `Info` attribute.
    None,
}

impl InfoAttribute {
    fn of(value: Option<AttributeValue>) -> Self {
        match value {
            Some(AttributeValue::S(stored)) => match info_field::clear(&stored) {
                Cow::Borrowed(_) => Self::Text(stored),
                Cow::Owned(text) => Self::Filled { text, stored },
            },
            Some(other) => Self::Other(other),
            None => Self::None,
        }
    }

    /// Returns the attribute with this string.
    #[cfg(test)]
    pub(super) fn of_text(text: &str) -> Self {
        Self::of(Some(AttributeValue::S(text.to_owned())))
    }

    /// Returns the string, as terraform wrote it. Empty if the attribute is not a string or does not exist.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Filled { text, .. } => text,
            Self::Other(_) | Self::None => "",
        }
    }
}

/// The item of a lock with all its attributes, as it was read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item(HashMap<String, AttributeValue>);

/// The largest item that a write stores for one write capacity unit, in bytes (DynamoDB Developer Guide, "Read and
/// write operations").
pub(crate) const MAX_ITEM_BYTES: usize = 1024;

impl Item {
    /// Returns the `Info` attribute.
    pub(crate) fn info(&self) -> InfoAttribute {
        InfoAttribute::of(self.0.get("Info").cloned())
    }

    /// Parses the lease record of the lock `lock`. `None` if the item has no attribute `tf`.
    pub(crate) fn record(&self, lock: &str) -> Option<Result<Record, NotBelieved>> {
        let value = match self.0.get(FIELD)? {
            // Another type cannot be a record of ours, and its members could not be compared.
            value @ AttributeValue::M(_) if size_of(value) > MAX_RECORD_BYTES => {
                return Some(Err(NotBelieved::TooLarge));
            }
            value @ AttributeValue::M(_) => value_of(value, 0),
            _ => None,
        };
        Some(value.ok_or(NotBelieved::Malformed).and_then(|value| Record::of_value(&value, lock)))
    }

    /// Returns the claim of another host. `None` if there is none, or if the record is not believed.
    fn claim(&self) -> Option<Claim> {
        let lock = LockInfo::parse(self.info().text())?;
        self.record(&lock.id)?.ok()?.taken
    }

    /// Returns the item with `record` in place of its record, and with the field `Info` that belongs to it. That field
    /// is left as terraform wrote it, and then facts about the holder are left out, if the item would be larger than
    /// [`MAX_ITEM_BYTES`].
    fn with(&self, record: &Record) -> Self {
        let info = self.info();
        let with = |record: &Record, text: Option<String>| {
            let mut item = self.clone();
            item.0.insert(FIELD.to_owned(), attribute_of(&record.to_value()));
            if let Some(text) = text {
                item.0.insert("Info".to_owned(), AttributeValue::S(text));
            }
            item
        };
        let filled = with(record, info_field::fill(info.text(), record));
        if filled.size() <= MAX_ITEM_BYTES {
            return filled;
        }
        let as_written = match info {
            InfoAttribute::Filled { text, .. } => Some(text),
            InfoAttribute::Text(_) | InfoAttribute::Other(_) | InfoAttribute::None => None,
        };
        let with = |record: &Record| with(record, as_written.clone());
        with(&record.cut(|record| with(record).size() <= MAX_ITEM_BYTES))
    }

    /// Returns the size of the item in bytes, as DynamoDB computes it.
    fn size(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + size_of(value)).sum()
    }
}

/// Returns the size of an attribute's value in bytes, as DynamoDB computes it (DynamoDB Developer Guide, "Item sizes
/// and formats"). For a number it is the upper limit.
fn size_of(value: &AttributeValue) -> usize {
    match value {
        AttributeValue::S(text) => text.len(),
        AttributeValue::N(number) => number_size(number),
        AttributeValue::B(bytes) => bytes.as_ref().len(),
        AttributeValue::Ss(texts) => texts.iter().map(String::len).sum(),
        AttributeValue::Ns(numbers) => numbers.iter().map(|number| number_size(number)).sum(),
        AttributeValue::Bs(list) => list.iter().map(|bytes| bytes.as_ref().len()).sum(),
        AttributeValue::M(map) => 3 + map.iter().map(|(name, value)| 1 + name.len() + size_of(value)).sum::<usize>(),
        AttributeValue::L(list) => 3 + list.iter().map(|value| 1 + size_of(value)).sum::<usize>(),
        _ => 1,
    }
}

/// One byte for two digits, one more, and one more if the number is negative.
fn number_size(number: &str) -> usize {
    number.len().div_ceil(2) + 2
}

/// Returns the attribute value with the content of a JSON value.
fn attribute_of(value: &Value) -> AttributeValue {
    match value {
        Value::Null => AttributeValue::Null(true),
        Value::Bool(value) => AttributeValue::Bool(*value),
        Value::Number(number) => AttributeValue::N(number.to_string()),
        Value::String(text) => AttributeValue::S(text.clone()),
        Value::Array(list) => AttributeValue::L(list.iter().map(attribute_of).collect()),
        Value::Object(map) => {
            AttributeValue::M(map.iter().map(|(name, value)| (name.clone(), attribute_of(value))).collect())
        }
    }
}

/// Returns the JSON value with the content of an attribute value that lies below `depth` others. `None` if JSON has no
/// such value, or if it is nested more deeply than DynamoDB permits (32 levels).
fn value_of(value: &AttributeValue, depth: usize) -> Option<Value> {
    if depth > 32 {
        return None;
    }
    Some(match value {
        AttributeValue::Null(_) => Value::Null,
        AttributeValue::Bool(value) => Value::Bool(*value),
        AttributeValue::N(number) => Value::Number(serde_json::from_str(number).ok()?),
        AttributeValue::S(text) => Value::String(text.clone()),
        AttributeValue::L(list) => {
            Value::Array(list.iter().map(|value| value_of(value, depth + 1)).collect::<Option<_>>()?)
        }
        AttributeValue::M(map) => {
            let member = |(name, value): (&String, _)| Some((name.clone(), value_of(value, depth + 1)?));
            Value::Object(map.iter().map(member).collect::<Option<_>>()?)
        }
        _ => return None,
    })
}

/// The item of a lock: its table, and its `LockID`, which is `bucket/key` of the state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ItemKey<'a> {
    pub(crate) table: &'a str,
    pub(crate) path: &'a str,
}

impl ItemKey<'_> {
    fn lock_id(self) -> AttributeValue {
        AttributeValue::S(self.path.to_owned())
    }

    /// The `LockID` of the item with the state's digest (client.go, `lockPath` and `stateIDSuffix`).
    fn digest_id(self) -> AttributeValue {
        AttributeValue::S(format!("{}-md5", self.path))
    }
}

/// One segment of a parallel scan of a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// The number of the segment, from 0.
    pub(crate) number: i32,
    /// The total number of segments.
    pub(crate) of: i32,
}

/// Reads the `Info` attribute of the item as it is now (a consistent read). `None` if there is no such item.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, for example because there is no such table.
pub(crate) async fn read(client: &Client, item: ItemKey<'_>) -> Result<Option<InfoAttribute>, Failure> {
    Ok(attribute(client, item, item.lock_id(), "Info").await?.map(InfoAttribute::of))
}

/// Like [`read`]. The result also says whether the item has a lease record, whatever is in it. If the attribute of the
/// record may not be read, the item counts as one without a record.
///
/// # Errors
/// As [`read`].
pub(crate) async fn read_info_and_lease(
    client: &Client,
    item: ItemKey<'_>,
) -> Result<Option<(InfoAttribute, bool)>, Failure> {
    let answer = client
        .get_item()
        .table_name(item.table)
        .key("LockID", item.lock_id())
        .projection_expression("LockID, #info, #lease")
        .expression_attribute_names("#info", "Info")
        .expression_attribute_names("#lease", FIELD)
        .consistent_read(true)
        .send()
        .await
        .map_err(|error| failure("dynamodb:GetItem", &error));
    match answer {
        Ok(answer) => {
            Ok(answer.item.map(|mut item| (InfoAttribute::of(item.remove("Info")), item.contains_key(FIELD))))
        }
        // A policy may permit only the attributes that terraform itself reads (the condition key
        // `dynamodb:Attributes`).
        Err(failure) if failure.denied().is_some() => Ok(read(client, item).await?.map(|info| (info, false))),
        Err(failure) => Err(failure),
    }
}

/// Reads the MD5 of the state that terraform wrote last. Terraform stores it in another item of the same table
/// (client.go, `putMD5`). `None` if there is no such item, or if it has no `Digest` that is a string.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, for example because there is no such table.
pub(crate) async fn digest(client: &Client, item: ItemKey<'_>) -> Result<Option<String>, Failure> {
    let digest = attribute(client, item, item.digest_id(), "Digest").await?.flatten();
    Ok(digest.and_then(|value| value.as_s().ok().cloned()))
}

/// Reads the attribute `name` of an item. The outer `Option` is `None` if there is no such item, the inner one if the
/// item has no such attribute.
async fn attribute(
    client: &Client,
    ItemKey { table, .. }: ItemKey<'_>,
    id: AttributeValue,
    name: &str,
) -> Result<Option<Option<AttributeValue>>, Failure> {
    let answer = client
        .get_item()
        .table_name(table)
        .key("LockID", id)
        .projection_expression("LockID, #name")
        .expression_attribute_names("#name", name)
        .consistent_read(true)
        .send()
        .await
        .map_err(|error| failure("dynamodb:GetItem", &error))?;
    Ok(answer.item.map(|mut item| item.remove(name)))
}

/// Reads the whole item as it is now (a consistent read), and the service's time in the response. The first is `None`
/// if there is no such item.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, for example because there is no such table.
pub(crate) async fn read_item(client: &Client, key: ItemKey<'_>) -> Result<(Option<Item>, Option<Timestamp>), Failure> {
    let time = ServiceTime::default();
    let request = client.get_item().table_name(key.table).key("LockID", key.lock_id()).consistent_read(true);
    let answer = request.customize().interceptor(time.clone()).send().await;
    let answer = answer.map_err(|error| failure("dynamodb:GetItem", &error))?;
    Ok((answer.item.map(Item), time.get()))
}

/// Replaces the record of the item `read` by `record`, on the condition that it is still the same lock, is not claimed,
/// and has no record that is as new ([`crate::lease::record::Renewal::replaces`]). Every other attribute is written as
/// it was read. So a `PutItem` is enough, which terraform's own policy permits; an `UpdateItem` is not in that policy.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition. It may have been written
/// nevertheless.
pub(crate) async fn renew(
    client: &Client,
    key: ItemKey<'_>,
    read: &Item,
    record: &Record,
) -> Result<Written<Item>, Failure> {
    let number = |number: &dyn ToString| AttributeValue::N(number.to_string());
    let renewal = record.renewal();
    let condition = Condition::default()
        .info(read)
        .and("attribute_not_exists(#tf.#taken)")
        .and(
            "(attribute_not_exists(#tf) OR #tf.#renewed < :renewed OR (#tf.#renewed = :renewed AND #tf.#beat < :beat))",
        )
        .name("#tf", FIELD)
        .name("#taken", "taken")
        .name("#renewed", "renewed")
        .name("#beat", "beat")
        .value(":renewed", number(&renewal.renewed))
        .value(":beat", number(&renewal.beat));
    put(client, key, read.with(record), condition).await
}

/// Replaces the record of the item `read` by `claim`, on the condition that lock and record are exactly as they were
/// read.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition. It may have been written
/// nevertheless.
pub(crate) async fn claim(
    client: &Client,
    key: ItemKey<'_>,
    read: &Item,
    claim: &Record,
) -> Result<Written<Item>, Failure> {
    put(client, key, read.with(claim), Condition::default().info(read).record(read)).await
}

/// Deletes the item, on the condition that lock and record are exactly those of `claimed`.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition.
pub(crate) async fn delete_claimed(client: &Client, key: ItemKey<'_>, claimed: &Item) -> Result<Deleted, Failure> {
    let condition = Condition::default().info(claimed).record(claimed);
    let request = client
        .delete_item()
        .table_name(key.table)
        .key("LockID", key.lock_id())
        .condition_expression(condition.text)
        .set_expression_attribute_names(Some(condition.names))
        .set_expression_attribute_values(Some(condition.values).filter(|values| !values.is_empty()));
    send_delete(request).await
}

/// The condition of a write.
#[derive(Debug, Default)]
struct Condition {
    text: String,
    names: HashMap<String, String>,
    values: HashMap<String, AttributeValue>,
}

impl Condition {
    /// `Info` is as in `item`.
    fn info(self, item: &Item) -> Self {
        self.equal("#info", "Info", ":info", item)
    }

    /// The record is as in `item`.
    fn record(self, item: &Item) -> Self {
        self.equal("#tf", FIELD, ":tf", item)
    }

    fn equal(self, name: &str, attribute: &str, value: &str, item: &Item) -> Self {
        let condition = self.name(name, attribute);
        match item.0.get(attribute) {
            Some(read) => condition.and(&format!("{name} = {value}")).value(value, read.clone()),
            // There must be an item: this is never true for a lock that is gone.
            None => condition.and(&format!("attribute_exists(LockID) AND attribute_not_exists({name})")),
        }
    }

    fn and(mut self, text: &str) -> Self {
        if !self.text.is_empty() {
            self.text.push_str(" AND ");
        }
        self.text.push_str(text);
        self
    }

    fn name(mut self, name: &str, attribute: &str) -> Self {
        self.names.insert(name.to_owned(), attribute.to_owned());
        self
    }

    fn value(mut self, name: &str, value: AttributeValue) -> Self {
        self.values.insert(name.to_owned(), value);
        self
    }
}

async fn put(client: &Client, key: ItemKey<'_>, item: Item, condition: Condition) -> Result<Written<Item>, Failure> {
    let time = ServiceTime::default();
    let request = client
        .put_item()
        .table_name(key.table)
        .set_item(Some(item.0.clone()))
        .condition_expression(condition.text)
        .set_expression_attribute_names(Some(condition.names))
        .set_expression_attribute_values(Some(condition.values).filter(|values| !values.is_empty()));
    let answer = request.customize().interceptor(time.clone()).send().await;
    Ok(if written(answer.map(drop))? { Written::Yes(item, time.get()) } else { Written::Changed })
}

/// The properties of a table on which a scan and a conditional delete depend.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    /// The name of the partition key, and of the sort key if there is one.
    pub(crate) keys: Vec<String>,
    /// The provisioned read capacity of the table, or the maximum that is set for a table that is billed per request, in
    /// read capacity units. `None` if there is no limit.
    pub(crate) read_capacity: Option<i64>,
    /// The approximate number of items, which may be some hours old. `None` if the response does not have it.
    pub(crate) items: Option<i64>,
    /// The regions to which the table is replicated. Empty if it is not a global table.
    pub(crate) replicas: Vec<String>,
    /// Whether all replicas confirm a write before DynamoDB responds to it (a global table with multi-region strong
    /// consistency).
    pub(crate) strong: bool,
}

impl Description {
    /// Whether the condition of a write is checked only in the region that receives the request. If the same item is
    /// then written in two regions, the later write wins, even if its condition was true only in its own region.
    pub(crate) fn last_writer_wins(&self) -> bool {
        !self.replicas.is_empty() && !self.strong
    }
}

/// Reads the description of a table.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, or if the response does not describe a table.
pub(crate) async fn describe(client: &Client, table: &str) -> Result<Description, Failure> {
    let answer = client
        .describe_table()
        .table_name(table)
        .send()
        .await
        .map_err(|error| failure("dynamodb:DescribeTable", &error))?;
    // Every table has a key. A response without one comes from a proxy.
    let table = answer.table.filter(|table| !table.key_schema().is_empty());
    let table = table.ok_or_else(|| Failure::no_answer(SERVICE, "the response does not describe a table"))?;
    Ok(Description {
        keys: table.key_schema().iter().map(|key| key.attribute_name.clone()).collect(),
        read_capacity: read_capacity(&table),
        items: table.item_count(),
        replicas: table.replicas().iter().filter_map(|replica| replica.region_name.clone()).collect(),
        strong: table.multi_region_consistency() == Some(&MultiRegionConsistency::Strong),
    })
}

/// As [`Description::read_capacity`].
fn read_capacity(table: &TableDescription) -> Option<i64> {
    let provisioned = table.provisioned_throughput().and_then(ProvisionedThroughputDescription::read_capacity_units);
    let maximum = table.on_demand_throughput().and_then(OnDemandThroughput::max_read_request_units);
    // DynamoDB reports 0 for a table that is billed per request, and -1 if such a table has no maximum (DynamoDB API
    // reference, OnDemandThroughput).
    [provisioned, maximum].into_iter().flatten().find(|units| *units > 0)
}

/// An item that a scan has found.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ScannedItem {
    /// The `LockID`.
    pub(crate) key: String,
    pub(crate) info: InfoAttribute,
    /// The lease record, or the reason why it is not believed. `None` if the item has no attribute `tf`, or if it is
    /// not a lock.
    pub(crate) record: Option<Result<Record, NotBelieved>>,
}

impl ScannedItem {
    fn of(ScannedAttributes { lock_id, info, record }: ScannedAttributes) -> Self {
        let key = match lock_id {
            Some(AttributeValue::S(text)) => text,
            _ => String::new(),
        };
        let info = InfoAttribute::of(info);
        // Most locks have no record, and then the text need not be parsed here.
        let record = record.and_then(|record| {
            let lock = LockInfo::parse(info.text())?;
            Item([(FIELD.to_owned(), record)].into()).record(&lock.id)
        });
        Self { key, info, record }
    }
}

/// Which page of a table to read.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) segment: Segment,
    /// How many items the service examines at most. `None` for no limit but that of the service, 1 MB.
    pub(crate) limit: Option<i32>,
    /// The key after which the page begins. `None` for the start of the segment.
    pub(crate) from: Option<HashMap<String, AttributeValue>>,
}

/// One page of a scan.
#[derive(Debug)]
pub(crate) struct TablePage<T> {
    /// What was made of its items.
    pub(crate) content: T,
    /// How many items the service examined for this page, digests included.
    pub(crate) scanned: u64,
    /// How many read capacity units the page used. `None` if the service does not report it.
    pub(crate) consumed: Option<f64>,
    /// The key after which the next page begins. `None` if this is the last page.
    pub(crate) next: Option<HashMap<String, AttributeValue>>,
}

/// Reads one page of a table. The read is eventually consistent, which costs half as much as a consistent one.
///
/// `use_items` gets each item that is not a digest, and the service's time in the response. The time is `None` if the
/// response has none that counts ([`super::service_time`]). It may be called on another thread, and more than once: what
/// the last call returns is the content of the page. If it does not take all items, the SDK reads them again.
///
/// # Errors
/// Returns a [`Failure`] if the request fails.
pub(crate) async fn scan<T: Send + 'static>(
    client: &Client,
    table: &str,
    Page { segment, limit, from }: Page,
    use_items: impl Fn(&mut dyn Iterator<Item = ScannedItem>, Option<Timestamp>) -> T + Send + Sync + 'static,
) -> Result<TablePage<T>, Failure> {
    let time = ServiceTime::default();
    let use_items: UseItems<T> = Arc::new(move |items, date| use_items(&mut items.map(ScannedItem::of), date));
    let timeouts = client.config().timeout_config().cloned().unwrap_or_else(TimeoutConfig::disabled);
    let timeout = timeouts.operation_attempt_timeout();
    let reader = client.config().http_client().map(|client| ItemReader::new(client, timeout, Arc::clone(&use_items)));
    let mut request = client
        .scan()
        .table_name(table)
        .segment(segment.number)
        .total_segments(segment.of)
        .set_limit(limit)
        .set_exclusive_start_key(from)
        // The service charges for the whole item, whatever is projected.
        .projection_expression("LockID, #info, #tf")
        // Most items of the table are digests of states, so leave those out.
        .filter_expression("attribute_exists(#info) OR attribute_not_exists(Digest)")
        .expression_attribute_names("#info", "Info")
        .expression_attribute_names("#tf", FIELD)
        .return_consumed_capacity(aws_sdk_dynamodb::types::ReturnConsumedCapacity::Total)
        .customize()
        .interceptor(time.clone());
    if let Some(reader) = reader.clone() {
        let timeouts = timeouts.to_builder().disable_operation_attempt_timeout().build();
        let own = aws_sdk_dynamodb::Config::builder().http_client(reader).timeout_config(timeouts);
        request = request.config_override(own);
    }
    let answer = request.send().await.map_err(|error| failure("dynamodb:Scan", &error))?;
    let content = reader.and_then(|reader| reader.take()).unwrap_or_else(|| {
        let mut by_sdk = answer.items.unwrap_or_default().into_iter().map(ScannedAttributes::from);
        use_items(&mut by_sdk, time.get())
    });
    Ok(TablePage {
        content,
        scanned: answer.scanned_count.try_into().unwrap_or(0),
        consumed: answer.consumed_capacity.and_then(|consumed| consumed.capacity_units),
        next: answer.last_evaluated_key.filter(|key| !key.is_empty()),
    })
}

/// Puts a lock if there is no item with its `LockID`, as terraform does. Returns false if there is one.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition. The lock may have been put
/// nevertheless.
pub(crate) async fn put_if_absent(client: &Client, item: ItemKey<'_>, info: &str) -> Result<bool, Failure> {
    let answer = client
        .put_item()
        .table_name(item.table)
        .item("LockID", item.lock_id())
        .item("Info", AttributeValue::S(info.to_owned()))
        .condition_expression("attribute_not_exists(LockID)")
        .send()
        .await;
    written(answer.map(drop))
}

/// Replaces the digest of the state by `new`, on the condition that it is `old`. Returns false if there is another
/// digest or none.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition.
pub(crate) async fn replace_digest(client: &Client, item: ItemKey<'_>, old: &str, new: &str) -> Result<bool, Failure> {
    let answer = client
        .put_item()
        .table_name(item.table)
        .item("LockID", item.digest_id())
        .item("Digest", AttributeValue::S(new.to_owned()))
        .condition_expression("Digest = :old")
        .expression_attribute_values(":old", AttributeValue::S(old.to_owned()))
        .send()
        .await;
    written(answer.map(drop))
}

/// Deletes the digest of the state, on the condition that it is `old`. Returns false if there is another digest or
/// none.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition.
pub(crate) async fn delete_digest(client: &Client, item: ItemKey<'_>, old: &str) -> Result<bool, Failure> {
    let request = client
        .delete_item()
        .table_name(item.table)
        .key("LockID", item.digest_id())
        .condition_expression("Digest = :old")
        .expression_attribute_values(":old", AttributeValue::S(old.to_owned()));
    send_delete(request).await.map(|deleted| matches!(deleted, Deleted::Yes(_)))
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

/// Deletes the item, on the condition that its `Info` attribute is still exactly `info`. The condition never uses
/// `contains`, because an empty or partial ID would match. Its lease record may have changed. The response contains the
/// deleted item, so it shows whether another host had claimed the lock when it was deleted.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition.
pub(crate) async fn delete(client: &Client, item: ItemKey<'_>, info: &InfoAttribute) -> Result<Deleted, Failure> {
    let request = client.delete_item().table_name(item.table).key("LockID", item.lock_id());
    let equals = |value: AttributeValue| {
        request.clone().condition_expression("Info = :info").expression_attribute_values(":info", value)
    };
    let request = match info {
        InfoAttribute::Text(stored) | InfoAttribute::Filled { stored, .. } => equals(AttributeValue::S(stored.clone())),
        InfoAttribute::Other(value) => equals(value.clone()),
        InfoAttribute::None => {
            let condition = "attribute_exists(LockID) AND attribute_not_exists(Info)";
            request.clone().condition_expression(condition)
        }
    };
    match send_delete(request.clone().return_values(ReturnValue::AllOld)).await {
        // A policy may permit a delete that returns nothing (the condition key `dynamodb:ReturnValues`).
        Err(failure) if failure.denied().is_some() => send_delete(request).await,
        deleted => deleted,
    }
}

async fn send_delete(request: DeleteItemFluentBuilder) -> Result<Deleted, Failure> {
    let attempts = Attempts::default();
    match request.customize().interceptor(attempts.clone()).send().await {
        Ok(answer) => Ok(Deleted::Yes(answer.attributes.and_then(|item| Item(item).claim()))),
        Err(error) if error.as_service_error().is_some_and(DeleteItemError::is_conditional_check_failed_exception) => {
            Ok(Deleted::refused(attempts.were_several()))
        }
        Err(error) => Err(failure("dynamodb:DeleteItem", &error)),
    }
}

/// Converts the error of a request. `action` is the name of the request's action in an IAM policy.
pub(super) fn failure<E>(action: &'static str, error: &SdkError<E>) -> Failure
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    Failure::of_request(SERVICE, action, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(info: &str) -> Item {
        let attributes = [
            ("LockID", AttributeValue::S("bucket/key".into())),
            ("Info", AttributeValue::S(info.into())),
            ("Owner", AttributeValue::Ss(vec!["a".into()])),
        ];
        Item(attributes.map(|(name, value)| (name.to_owned(), value)).into())
    }

    fn record() -> Record {
        use crate::lease::record::{Claim, Promise, Renewal};
        let terms = crate::lease::terms::Terms::new(std::time::Duration::from_mins(5)).unwrap();
        let mut record = Record::new("id", terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop);
        record.keeper = u64::MAX;
        record.holder.job = "j".repeat(600);
        record.holder.host = "vm".to_owned();
        record.taken = Some(Claim { by: "o@h".into(), at: 1_790_000_400, number: u64::MAX });
        record
    }

    #[test]
    fn a_table_has_the_capacity_that_is_provisioned_or_the_maximum_that_is_set() {
        for (provisioned, maximum, expected) in [
            (None, None, None),
            (Some(0), None, None),
            (Some(0), Some(-1), None),
            (Some(0), Some(40), Some(40)),
            (Some(5), None, Some(5)),
            (None, Some(40), Some(40)),
        ] {
            let provisioned =
                provisioned.map(|units| ProvisionedThroughputDescription::builder().read_capacity_units(units).build());
            let maximum = maximum.map(|units| OnDemandThroughput::builder().max_read_request_units(units).build());
            let table = TableDescription::builder()
                .set_provisioned_throughput(provisioned)
                .set_on_demand_throughput(maximum)
                .build();
            assert_eq!(read_capacity(&table), expected, "{table:?}");
        }
    }

    #[test]
    fn an_item_has_the_record_that_was_put_into_it_and_every_other_attribute() {
        let with = item("{}").with(&record());
        assert_eq!(with.record("id"), Some(Ok(record())));
        assert_eq!(with.record("other"), Some(Err(NotBelieved::AnotherLock)));
        assert_eq!(item("{}").record("id"), None);
        let mut without = with;
        without.0.remove(FIELD);
        assert_eq!(without, item("{}"));
    }

    #[test]
    fn a_scanned_item_has_a_record_of_at_most_2_kib_and_only_if_it_is_a_lock() {
        let lock = r#"{"ID":"id","Path":"b/k"}"#;
        let scanned = |item: Item| ScannedItem::of(item.0.into());
        let with = scanned(item(lock).with(&record()));
        assert_eq!((with.key.as_str(), with.info.text()), ("bucket/key", lock));
        assert!(with.record.is_some_and(|record| record.is_ok()));
        assert_eq!(scanned(item(lock)).record, None);
        assert_eq!(scanned(item("{}").with(&record())).record, None);
        let text = |length: usize| AttributeValue::S("x".repeat(length));
        for (value, reason) in [
            (AttributeValue::M([("x".to_owned(), text(2048))].into()), NotBelieved::TooLarge),
            (AttributeValue::M([("x".to_owned(), text(9))].into()), NotBelieved::Malformed),
            (AttributeValue::M(HashMap::new()), NotBelieved::Malformed),
            (text(300_000), NotBelieved::Malformed),
            (AttributeValue::Null(true), NotBelieved::Malformed),
            (AttributeValue::L(vec![AttributeValue::Bool(true)]), NotBelieved::Malformed),
        ] {
            let mut item = item(lock);
            item.0.insert(FIELD.to_owned(), value);
            assert_eq!(scanned(item).record, Some(Err(reason)));
        }
    }

    #[test]
    fn an_item_with_a_record_is_one_write_unit() {
        let with = item(&"i".repeat(400)).with(&record());
        assert!(with.size() <= MAX_ITEM_BYTES, "{}", with.size());
        let stored = with.record("id").unwrap().unwrap();
        assert_eq!((stored.holder.job.as_str(), stored.holder.host.as_str()), ("", "vm"));
        // The paths of the lock alone are larger.
        let large = item(&"i".repeat(2000)).with(&record()).record("id").unwrap().unwrap();
        assert_eq!((large.holder.host.as_str(), large.renewal()), ("", record().renewal()));
    }

    #[test]
    fn an_attribute_that_is_no_record_is_not_believed() {
        let mut deep = AttributeValue::Null(true);
        for _ in 0..40 {
            deep = AttributeValue::M([("x".to_owned(), deep)].into());
        }
        let text = |text: String| AttributeValue::S(text);
        let map = |name: &str, value| AttributeValue::M([(name.to_owned(), value)].into());
        for (value, reason) in [
            (text(record().to_json()), NotBelieved::Malformed),
            (AttributeValue::M(HashMap::new()), NotBelieved::Malformed),
            (AttributeValue::L(vec![]), NotBelieved::Malformed),
            (map("v", AttributeValue::N("NaN".into())), NotBelieved::Malformed),
            (map("v", AttributeValue::B(aws_sdk_dynamodb::primitives::Blob::new("x"))), NotBelieved::Malformed),
            (map("x", text("x".repeat(3000))), NotBelieved::TooLarge),
            (deep, NotBelieved::Malformed),
        ] {
            let mut item = item("{}");
            item.0.insert(FIELD.to_owned(), value.clone());
            assert_eq!(item.record("id"), Some(Err(reason)), "{value:?}");
        }
    }

    /// DynamoDB Developer Guide, "Item sizes and formats".
    #[test]
    fn an_item_is_as_large_as_its_names_and_values() {
        let number = |number: &str| AttributeValue::N(number.into());
        for (value, size) in [
            (AttributeValue::S("é".into()), 2),
            (AttributeValue::Bool(true), 1),
            (AttributeValue::Null(true), 1),
            (AttributeValue::M(HashMap::new()), 3),
            (AttributeValue::M([("ab".to_owned(), AttributeValue::S("cde".into()))].into()), 3 + 1 + 2 + 3),
            (AttributeValue::L(vec![AttributeValue::S("cde".into())]), 3 + 1 + 3),
            (AttributeValue::Ss(vec!["a".into(), "bc".into()]), 3),
        ] {
            assert_eq!(size_of(&value), size, "{value:?}");
        }
        assert!(
            (2..=4).contains(&size_of(&number("27"))) && (10..=12).contains(&size_of(&number("-123456789012345678")))
        );
    }

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

    #[test]
    fn any_body_is_read_without_a_panic_and_one_with_another_member_is_no_answer() {
        use proptest::prelude::*;
        let body = r#"{"Item":{"LockID":{"S":"b/k"},"Info":{"S":"{}"}},"ConsumedCapacity":null}"#;
        let strategy = (crate::generated_input::changed(body.as_bytes().to_vec()), "[a-z]{1,8}");
        crate::generated_input::for_all(file!(), &strategy, |(changed, name)| {
            let _ = is_an_answer(&changed);
            let with = format!(r#"{{"{name}":1,{}"#, &body[1..]);
            prop_assert!(is_an_answer(body.as_bytes()) && !is_an_answer(with.as_bytes()));
            Ok(())
        });
    }
}
