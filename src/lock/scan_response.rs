//! Reads the items of a page of a lock table.
//!
//! The SDK makes a map of each item, with a key and a value that it copies. A page has thousands of items, and that
//! took a quarter of the time of a whole scan. So the attributes that a scan needs are read from the text of the
//! response, and the SDK reads the rest of it. It also reads every error, and every response whose items are not as
//! expected. The other attributes of an item are not looked at.
//!
//! The body is read before the SDK sees the response. So its protection against a stalled body does not apply. An attempt
//! whose body ends early is repeated. The timeout of an attempt applies until the whole body has arrived, and not to what
//! is done with its items: that takes long on a slow host, and another request would not make it faster.
//!
//! The items are read and used ([`UseItems`]) on a thread of their own, so that the pages of several segments are read at
//! the same time. Each item is used before the next one is read. So its memory is freed soon, by the thread that has
//! allocated it, and the next item gets the same memory: that is what an allocator does fastest.

use std::collections::HashMap;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::byte_stream::{AggregatedBytes, ByteStream};
use jiff::Timestamp;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokio::task;

use super::service_time;
use crate::lease::record::FIELD;

/// The attributes of an item that a scan needs. `None` for an attribute that the item does not have.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ScannedAttributes {
    pub(super) lock_id: Option<AttributeValue>,
    pub(super) info: Option<AttributeValue>,
    /// The lease record, the attribute [`FIELD`].
    pub(super) record: Option<AttributeValue>,
}

impl From<HashMap<String, AttributeValue>> for ScannedAttributes {
    fn from(mut attributes: HashMap<String, AttributeValue>) -> Self {
        let mut take = |name| attributes.remove(name);
        Self { lock_id: take("LockID"), info: take("Info"), record: take(FIELD) }
    }
}

/// What is made of the items of a page, with the service's time in the response ([`service_time`]).
pub(super) type UseItems<T> =
    Arc<dyn Fn(&mut dyn Iterator<Item = ScannedAttributes>, Option<Timestamp>) -> T + Send + Sync>;

/// The HTTP client of one request for a page. It takes the items out of the response.
pub(super) struct ItemReader<T> {
    client: SharedHttpClient,
    use_items: UseItems<T>,
    /// How long an attempt may take. `None` for no limit.
    timeout: Option<Duration>,
    /// What was made of the items in the response to the last attempt. `None` if they were left to the SDK.
    made: Arc<Mutex<Option<T>>>,
}

impl<T> Clone for ItemReader<T> {
    fn clone(&self) -> Self {
        let Self { client, use_items, timeout, made } = self;
        Self { client: client.clone(), use_items: Arc::clone(use_items), timeout: *timeout, made: Arc::clone(made) }
    }
}

impl<T> fmt::Debug for ItemReader<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ItemReader").field("client", &self.client).finish_non_exhaustive()
    }
}

impl<T> ItemReader<T> {
    /// Returns a reader of the response to a request that is sent with `client`. The request must have no other timeout
    /// for an attempt than `timeout`.
    pub(super) fn new(client: SharedHttpClient, timeout: Option<Duration>, use_items: UseItems<T>) -> Self {
        Self { client, use_items, timeout, made: Arc::default() }
    }

    /// Returns what was made of the items that were taken out of the response. `None` if the SDK has read them.
    pub(super) fn take(&self) -> Option<T> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<T: Send + 'static> HttpClient for ItemReader<T> {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let connector = self.client.http_connector(settings, components);
        SharedHttpConnector::new(ItemConnector { connector, reader: self.clone() })
    }
}

struct ItemConnector<T> {
    connector: SharedHttpConnector,
    reader: ItemReader<T>,
}

impl<T> fmt::Debug for ItemConnector<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ItemConnector").field("connector", &self.connector).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> HttpConnector for ItemConnector<T> {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (response, reader) = (self.connector.call(request), self.reader.clone());
        HttpConnectorFuture::new(async move {
            let whole = with_body(response);
            let (mut response, body) = match reader.timeout {
                None => whole.await?,
                Some(timeout) => {
                    let arrived = tokio::time::timeout(timeout, whole).await;
                    arrived.map_err(|elapsed| ConnectorError::timeout(elapsed.into()))??
                }
            };
            let body = body.into_bytes();
            if !response.status().is_success() {
                *response.body_mut() = SdkBody::from(body);
                return Ok(response);
            }
            let (date, use_items, whole) = (service_time::of_response(&response), reader.use_items, body.clone());
            let made = task::spawn_blocking(move || parse(&whole, |items| use_items(items, date))).await;
            let made = made.unwrap_or_else(|failed| match failed.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The runtime ends.
                Err(_) => None,
            });
            let (made, rest) = match made {
                Some((made, rest)) => {
                    // These describe the whole body.
                    for name in ["content-length", "x-amz-crc32"] {
                        response.headers_mut().remove(name);
                    }
                    (Some(made), SdkBody::from(rest))
                }
                None => (None, SdkBody::from(body)),
            };
            *reader.made.lock().unwrap_or_else(PoisonError::into_inner) = made;
            *response.body_mut() = rest;
            Ok(response)
        })
    }
}

/// Waits for a response and its whole body, and returns them apart.
async fn with_body(response: HttpConnectorFuture) -> Result<(HttpResponse, AggregatedBytes), ConnectorError> {
    let mut response = response.await?;
    let body = std::mem::replace(response.body_mut(), SdkBody::taken());
    let body = ByteStream::new(body).collect().await;
    Ok((response, body.map_err(|error| ConnectorError::io(error.into()))?))
}

/// Returns what `use_items` makes of the items of a response, and the response without them. `None` if it is not the
/// response to a scan, or if an attribute has a type that the SDK must read: what was made is then discarded.
fn parse<T>(body: &[u8], use_items: impl Fn(&mut dyn Iterator<Item = ScannedAttributes>) -> T) -> Option<(T, Vec<u8>)> {
    // So the parser need not check each text.
    let body = std::str::from_utf8(body).ok()?;
    let mut deserializer = serde_json::Deserializer::from_str(body);
    let (made, rest) = deserializer.deserialize_map(Response(use_items)).ok()?;
    deserializer.end().ok()?;
    Some((made, serde_json::to_vec(&rest).ok()?))
}

/// Reads the response to a scan (DynamoDB API reference, Scan). It uses the items, and keeps the rest.
struct Response<F>(F);

impl<'de, T, F: Fn(&mut dyn Iterator<Item = ScannedAttributes>) -> T> Visitor<'de> for Response<F> {
    type Value = (T, serde_json::Map<String, Value>);

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a response")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let (mut made, mut rest) = (None, serde_json::Map::new());
        while let Some(name) = map.next_key::<String>()? {
            if name != "Items" {
                rest.insert(name, map.next_value()?);
            } else if made.replace(map.next_value_seed(Items(&self.0))?).is_some() {
                return Err(M::Error::duplicate_field("Items"));
            }
        }
        Ok((made.ok_or_else(|| M::Error::missing_field("Items"))?, rest))
    }
}

/// Reads the items and uses each before the next one.
struct Items<'a, F>(&'a F);

impl<'de, T, F: Fn(&mut dyn Iterator<Item = ScannedAttributes>) -> T> DeserializeSeed<'de> for Items<'_, F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T, F: Fn(&mut dyn Iterator<Item = ScannedAttributes>) -> T> Visitor<'de> for Items<'_, F> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("items")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<T, S::Error> {
        let mut failed = None;
        let mut read = std::iter::from_fn(|| {
            items.next_element().unwrap_or_else(|error| {
                failed = Some(error);
                None
            })
        });
        let made = (self.0)(&mut read.by_ref().fuse());
        match failed {
            // The text is not as expected, so what was made is not complete.
            Some(error) => Err(error),
            None => Ok(made),
        }
    }
}

/// The name of an attribute.
#[derive(Deserialize)]
enum Name {
    #[serde(rename = "LockID")]
    LockId,
    Info,
    /// [`FIELD`].
    #[serde(rename = "tf")]
    Record,
    #[serde(other)]
    Other,
}

/// A derived `Deserialize` would also accept an array for an item, and `null` for an attribute.
impl<'de> Deserialize<'de> for ScannedAttributes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = ScannedAttributes;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an item")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<ScannedAttributes, M::Error> {
                let mut item = ScannedAttributes::default();
                while let Some(name) = map.next_key()? {
                    let attribute = match name {
                        Name::LockId => &mut item.lock_id,
                        Name::Info => &mut item.info,
                        Name::Record => &mut item.record,
                        Name::Other => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    if attribute.replace(map.next_value::<Attribute>()?.into()).is_some() {
                        return Err(M::Error::custom("an attribute twice"));
                    }
                }
                Ok(item)
            }
        }

        deserializer.deserialize_map(Members)
    }
}

/// An attribute value (DynamoDB API reference, AttributeValue). Neither terraform nor `tf` writes binary values, so
/// they are left to the SDK.
#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Attribute {
    S(String),
    N(String),
    Bool(bool),
    Null(bool),
    M(HashMap<String, Self>),
    L(Vec<Self>),
    Ss(Vec<String>),
    Ns(Vec<String>),
}

impl From<Attribute> for AttributeValue {
    fn from(attribute: Attribute) -> Self {
        match attribute {
            Attribute::S(text) => Self::S(text),
            Attribute::N(number) => Self::N(number),
            Attribute::Bool(value) => Self::Bool(value),
            Attribute::Null(value) => Self::Null(value),
            Attribute::M(map) => Self::M(values(map)),
            Attribute::L(list) => Self::L(list.into_iter().map(Into::into).collect()),
            Attribute::Ss(texts) => Self::Ss(texts),
            Attribute::Ns(numbers) => Self::Ns(numbers),
        }
    }
}

fn values(map: HashMap<String, Attribute>) -> HashMap<String, AttributeValue> {
    map.into_iter().map(|(name, value)| (name, value.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"{"LockID":{"S":"b/k"},"Info":{"S":"{\"ID\":\"a\"}"}}"#;

    fn parse(body: &[u8]) -> Option<(Vec<ScannedAttributes>, Vec<u8>)> {
        super::parse(body, |items| items.collect())
    }

    fn response(items: &str) -> String {
        format!(r#"{{"Count":1,"Items":[{items}],"LastEvaluatedKey":{{"LockID":{{"S":"b/k"}}}},"ScannedCount":7}}"#)
    }

    #[test]
    fn a_page_is_its_items_and_the_rest_of_the_response() {
        let (items, rest) = parse(response(&format!("{LOCK},{{}}")).as_bytes()).unwrap();
        let text = |text: &str| Some(AttributeValue::S(text.to_owned()));
        let lock = ScannedAttributes { lock_id: text("b/k"), info: text("{\"ID\":\"a\"}"), record: None };
        assert_eq!(items, [lock, ScannedAttributes::default()]);
        let rest: Value = serde_json::from_slice(&rest).unwrap();
        let expected = r#"{"Count":1,"LastEvaluatedKey":{"LockID":{"S":"b/k"}},"ScannedCount":7}"#;
        assert_eq!(rest, serde_json::from_str::<Value>(expected).unwrap());
    }

    #[test]
    fn an_attribute_has_its_type_and_its_content() {
        let map = |value: AttributeValue| AttributeValue::M([("m".to_owned(), value)].into());
        for (text, expected) in [
            (r#"{"S":"a\u0062"}"#, AttributeValue::S("ab".into())),
            (r#"{"N":"1.50"}"#, AttributeValue::N("1.50".into())),
            (r#"{"BOOL":true}"#, AttributeValue::Bool(true)),
            (r#"{"NULL":true}"#, AttributeValue::Null(true)),
            (r#"{"M":{"m":{"N":"7"}}}"#, map(AttributeValue::N("7".into()))),
            (r#"{"L":[{"S":"x"}]}"#, AttributeValue::L(vec![AttributeValue::S("x".into())])),
            (r#"{"SS":["x"]}"#, AttributeValue::Ss(vec!["x".into()])),
            (r#"{"NS":["1"]}"#, AttributeValue::Ns(vec!["1".into()])),
        ] {
            let item = format!(r#"{{"{FIELD}":{text},"Digest":{{"B":"AA=="}}}}"#);
            let (items, _) = parse(response(&item).as_bytes()).unwrap();
            let expected = ScannedAttributes { record: Some(expected), ..ScannedAttributes::default() };
            assert_eq!(items, [expected], "{text}");
        }
    }

    #[test]
    fn what_is_not_as_expected_is_left_to_the_sdk() {
        let with = |info: &str| response(&format!(r#"{{"LockID":{{"S":"b/k"}},"Info":{info}}}"#));
        for text in [
            String::new(),
            "{}".to_owned(),
            "[]".to_owned(),
            "<html>".to_owned(),
            r#"{"ScannedCount":0}"#.to_owned(),
            r#"{"Items":null}"#.to_owned(),
            response(LOCK) + "}",
            with(r#"{"B":"AA=="}"#),
            with(r#"{"M":{"x":{"BS":["AA=="]}}}"#),
            with(r#"{"LATER":"x"}"#),
            with(r#"{"S":"x","N":"7"}"#),
            with(r#"{"S":7}"#),
            with(r#""x""#),
            with("null"),
            with(r#"{"S":"x"},"Info":{"S":"x"}"#),
            response("null"),
            response(r#"[{"S":"b/k"},{"S":"x"},{"S":"x"}]"#),
            r#"{"Items":[],"Items":[]}"#.to_owned(),
            with(&format!("{}{}", r#"{"L":["#.repeat(200), "]}".repeat(200))),
        ] {
            assert!(parse(text.as_bytes()).is_none(), "{text}");
        }
    }
}
