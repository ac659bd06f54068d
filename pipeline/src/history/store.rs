//! The files of the history as DataFusion opens them: one that was merged or expired after a query has listed it is
//! read where it is kept for a while, so that the query goes on with the set of files that it began with.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use datafusion::object_store::local::LocalFileSystem;
use datafusion::object_store::path::Path as StorePath;
use datafusion::object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use futures::stream::BoxStream;

use super::files::swapped;
use super::table::{real_folder, store_path};

/// Reads local files; knows where those of the history folders are swapped to.
#[derive(Debug)]
pub(super) struct FilesStore {
    local: Arc<LocalFileSystem>,
    /// The history folders.
    folders: Vec<PathBuf>,
}

impl FilesStore {
    pub(super) fn new<'a>(folders: impl Iterator<Item = &'a Path>) -> Self {
        Self { local: Arc::new(LocalFileSystem::new()), folders: folders.map(real_folder).collect() }
    }

    /// Where a file that is not in its place may be.
    fn swapped(&self, location: &StorePath, error: Error) -> Result<StorePath> {
        if !matches!(error, Error::NotFound { .. }) {
            return Err(error);
        }
        let path = self.local.path_to_filesystem(location)?;
        let elsewhere = self.folders.iter().find_map(|folder| swapped(folder, &path));
        elsewhere.and_then(|path| store_path(&path).ok()).ok_or(error)
    }

    fn read_only<T>(&self) -> Result<T> {
        Err(Error::NotSupported { source: "history is read-only".into() })
    }
}

impl fmt::Display for FilesStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("history")
    }
}

#[async_trait]
impl ObjectStore for FilesStore {
    async fn get_opts(&self, location: &StorePath, options: GetOptions) -> Result<GetResult> {
        match self.local.get_opts(location, options.clone()).await {
            Err(error) => self.local.get_opts(&self.swapped(location, error)?, options).await,
            found => found,
        }
    }

    async fn get_ranges(&self, location: &StorePath, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        match self.local.get_ranges(location, ranges).await {
            Err(error) => self.local.get_ranges(&self.swapped(location, error)?, ranges).await,
            found => found,
        }
    }

    fn list(&self, prefix: Option<&StorePath>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.local.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&StorePath>) -> Result<ListResult> {
        self.local.list_with_delimiter(prefix).await
    }

    async fn put_opts(&self, _: &StorePath, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        self.read_only()
    }

    async fn put_multipart_opts(&self, _: &StorePath, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.read_only()
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<StorePath>>) -> BoxStream<'static, Result<StorePath>> {
        drop(locations);
        Box::pin(futures::stream::once(futures::future::ready(self.read_only())))
    }

    async fn copy_opts(&self, _: &StorePath, _: &StorePath, _: CopyOptions) -> Result<()> {
        self.read_only()
    }
}

#[cfg(test)]
mod tests {
    use datafusion::object_store::ObjectStoreExt;

    use super::*;

    #[tokio::test]
    async fn a_file_that_was_swapped_is_read_on_and_one_that_is_gone_is_not_found() {
        let scratch = tempfile::tempdir().expect("a folder");
        let folder = scratch.path().join("my history #1 é");
        let (table, swapped) = (folder.join("t/dt=2026-11-20/hh=12"), folder.join(".swap/t/dt=2026-11-20/hh=12"));
        std::fs::create_dir_all(&table).expect("folders");
        std::fs::create_dir_all(&swapped).expect("folders");
        std::fs::write(table.join("a"), "in its place").expect("a file");
        let store = FilesStore::new([folder.as_path()].into_iter());
        let location = store_path(&table.join("a")).expect("a path");
        std::fs::rename(table.join("a"), swapped.join("a")).expect("swapped");
        let whole = store.get(&location).await.expect("opened").bytes().await.expect("read");
        assert_eq!(whole, "in its place");
        assert_eq!(store.get_ranges(&location, &[3..6, 7..12]).await.expect("read"), ["its", "place"]);
        std::fs::remove_file(swapped.join("a")).expect("removed");
        for error in [store.get(&location).await.map(drop), store.get_ranges(&location, &[3..6, 7..12]).await.map(drop)]
        {
            assert!(matches!(error, Err(Error::NotFound { .. })), "{error:?}");
        }
        // Only history is read elsewhere, and nothing is written.
        let outside = store_path(&scratch.path().join("b")).expect("a path");
        assert!(matches!(store.get(&outside).await, Err(Error::NotFound { .. })));
        assert!(matches!(store.put(&location, "x".into()).await, Err(Error::NotSupported { .. })));
        assert!(matches!(store.delete(&location).await, Err(Error::NotSupported { .. })));
    }
}
