//! The window of a calendar that the clock is in, looked up once for each window.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use fusebox_core::{Wall, Window, saturating_nanos};

use crate::calendar::Calendar;

/// A calendar, and the window that was looked up last.
#[derive(Debug)]
pub struct Almanac {
    calendar: Calendar,
    latest: ArcSwapOption<Window>,
}

impl Almanac {
    /// Nothing is looked up yet.
    pub fn new(calendar: Calendar) -> Self {
        Self { calendar, latest: ArcSwapOption::empty() }
    }

    /// The window that `wall` is in.
    pub fn window(&self, wall: Wall) -> Window {
        let holds = |window: &Window| (window.start..window.end).contains(&wall);
        if let Some(window) = self.latest.load().as_deref().copied().filter(holds) {
            return window;
        }
        let (start, end) = self.calendar.window(Duration::from_nanos(wall.as_nanos()));
        let wall = |since_epoch| Wall::from_nanos(saturating_nanos(since_epoch));
        let window = Window { start: wall(start), end: wall(end) };
        self.latest.store(Some(Arc::new(window)));
        window
    }
}
