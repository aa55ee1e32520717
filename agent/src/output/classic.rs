//! The same metrics in Prometheus' text format 0.0.4, for who does not ask for OpenMetrics: `promtool check
//! metrics`, and collectors that never learned it.
//!
//! There a counter's metadata has the name of its samples, and there is no type `info`.

/// What the format calls itself.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether a request's `Accept` asks for it. Who asks for nothing gets OpenMetrics.
pub fn is_asked_for(accept: &str) -> bool {
    accept.contains("text/plain") && !accept.contains("application/openmetrics-text")
}

/// The metrics of an OpenMetrics text.
pub fn from_openmetrics(text: &str) -> String {
    let mut classic = String::with_capacity(text.len());
    let mut help = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // Its name depends on the type, which comes next.
            help = rest.split_once(' ').map(|(_, help)| help);
        } else if let Some(rest) = line.strip_prefix("# TYPE ")
            && let Some((name, kind)) = rest.split_once(' ')
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                _ => ("", kind),
            };
            if let Some(help) = help.take() {
                classic += &format!("# HELP {name}{suffix} {help}\n");
            }
            classic += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            classic += line;
            classic.push('\n');
        }
    }
    classic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_have_the_names_of_samples() {
        let openmetrics = "# HELP m_drops Packets dropped\n\
            # TYPE m_drops counter\n\
            m_drops_total{pod=\"a # b\"} 3\n\
            # HELP m_series Series\n\
            # TYPE m_series gauge\n\
            m_series 1\n\
            # HELP m_build Version\n\
            # TYPE m_build info\n\
            m_build_info{version=\"1\"} 1\n\
            # HELP m_seconds Time\n\
            # TYPE m_seconds histogram\n\
            m_seconds_bucket{le=\"+Inf\"} 2\n\
            # EOF\n";
        assert_eq!(
            from_openmetrics(openmetrics),
            "# HELP m_drops_total Packets dropped\n\
            # TYPE m_drops_total counter\n\
            m_drops_total{pod=\"a # b\"} 3\n\
            # HELP m_series Series\n\
            # TYPE m_series gauge\n\
            m_series 1\n\
            # HELP m_build_info Version\n\
            # TYPE m_build_info gauge\n\
            m_build_info{version=\"1\"} 1\n\
            # HELP m_seconds Time\n\
            # TYPE m_seconds histogram\n\
            m_seconds_bucket{le=\"+Inf\"} 2\n"
        );
    }

    #[test]
    fn prometheus_and_who_asks_for_nothing_get_openmetrics() {
        assert!(is_asked_for("text/plain"));
        assert!(is_asked_for("text/plain;version=0.0.4;q=0.5,*/*;q=0.1"));
        assert!(!is_asked_for(""));
        assert!(!is_asked_for("*/*"));
        // Prometheus 2.42.
        let prometheus = "application/openmetrics-text;version=1.0.0,\
            application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert!(!is_asked_for(prometheus));
    }
}
