#[derive(Debug, Default)]
pub struct Index;
