//! Days, weeks, months and years as people count them: where one ends and the next begins.
//!
//! The zones are those of the program, not of the machine, so that two servers agree.

use std::time::Duration;

use jiff::{
    Span, Timestamp,
    civil::{Date, Time},
    tz::{TimeZone, TimeZoneDatabase},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The latest moment that is looked up, in the year 8307: there is a next year to every year before it.
const LATEST: Duration = Duration::from_secs(200_000_000_000);

/// A unit of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Every {
    /// From midnight to midnight, however many hours that is.
    Day,
    /// From Monday, as ISO 8601 counts.
    Week,
    /// From the 1st.
    Month,
    /// From January 1st.
    Year,
}

/// Windows that follow each other without a gap, each one unit long on the calendar of a time zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    every: Every,
    zone: TimeZone,
}

/// A time zone that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "unknown time zone `{0}`: write a name of the IANA database, e.g. `Europe/Berlin` or `UTC`"
)]
pub struct InvalidZone(String);

impl Calendar {
    /// The calendar of an IANA time zone; capitals do not matter.
    ///
    /// # Errors
    /// If there is no such zone.
    pub fn new(every: Every, time_zone: &str) -> Result<Self, InvalidZone> {
        match TimeZoneDatabase::bundled().get(time_zone) {
            // `Etc/Unknown` has a name, and means that nobody knows.
            Ok(zone) if !zone.is_unknown() => Ok(Self { every, zone }),
            _ => Err(InvalidZone(time_zone.to_owned())),
        }
    }

    /// The unit.
    #[must_use]
    pub const fn every(&self) -> Every {
        self.every
    }

    /// The name of the zone, in its own capitals.
    #[must_use]
    pub fn time_zone(&self) -> &str {
        self.zone.iana_name().unwrap_or("UTC")
    }

    /// The window that contains `wall`: its start, and its end, which is the start of the next one. All are
    /// counted from the Unix epoch; a window that began before it is told from it.
    ///
    /// A window lasts until the next one *first* begins. Clocks that are turned back over midnight (in St.
    /// John's until 2011: from 00:01 to 23:01) show the day before once more, but what is over stays over.
    #[must_use]
    pub fn window(&self, wall: Duration) -> (Duration, Duration) {
        let now = Timestamp::UNIX_EPOCH.checked_add(wall.min(LATEST)).unwrap_or_default();
        let mut first = self.every.first_day(self.zone.to_datetime(now).date());
        loop {
            let next = self.every.next(first);
            let (start, end) = (self.start(first), self.start(next));
            if now < end {
                return (since_epoch(start), since_epoch(end));
            }
            first = next;
        }
    }

    /// When a day begins: at midnight, or where the clocks jump over it, right after that.
    fn start(&self, day: Date) -> Timestamp {
        self.zone.to_timestamp(day.to_datetime(Time::midnight())).unwrap_or(Timestamp::MAX)
    }
}

impl Every {
    /// A time that no window outlasts, in any zone: days were repeated, and clocks turned back.
    #[must_use]
    pub const fn longest(self) -> Duration {
        let days = match self {
            Self::Day => 2,
            Self::Week => 8,
            Self::Month => 32,
            Self::Year => 367,
        };
        Duration::from_secs(days * 24 * 60 * 60)
    }

    /// The first day of the window that a day lies in.
    fn first_day(self, day: Date) -> Date {
        match self {
            Self::Day => day,
            Self::Week => {
                day.saturating_sub(Span::new().days(day.weekday().to_monday_zero_offset()))
            }
            Self::Month => day.first_of_month(),
            Self::Year => day.first_of_year(),
        }
    }

    /// The first day of the next window.
    fn next(self, first_day: Date) -> Date {
        first_day.saturating_add(match self {
            Self::Day => Span::new().days(1),
            Self::Week => Span::new().weeks(1),
            Self::Month => Span::new().months(1),
            Self::Year => Span::new().years(1),
        })
    }
}

fn since_epoch(time: Timestamp) -> Duration {
    Duration::try_from(time.as_duration()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(60 * 60);
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const NANO: Duration = Duration::from_nanos(1);

    const EVERY: [Every; 4] = [Every::Day, Every::Week, Every::Month, Every::Year];

    fn at(time: &str) -> Duration {
        since_epoch(time.parse().unwrap())
    }

    fn calendar(every: Every, zone: &str) -> Calendar {
        Calendar::new(every, zone).unwrap()
    }

    /// Whether the window from `start` to `end` is found from its first to its last nanosecond.
    #[track_caller]
    fn assert_window(every: Every, zone: &str, start: &str, end: &str) -> Duration {
        let (start, end) = (at(start), at(end));
        let calendar = calendar(every, zone);
        let steps = (0..200).map(|step| start + (end - start) / 200 * step);
        for wall in steps.chain([end - NANO]) {
            assert_eq!(calendar.window(wall), (start, end), "at {wall:?}");
        }
        assert_eq!(calendar.window(end).0, end, "the end is the start of the next");
        end - start
    }

    #[test]
    fn a_zone_is_an_iana_name_and_is_told_in_its_own_capitals() {
        for (name, told) in [
            ("Europe/Berlin", "Europe/Berlin"),
            ("america/new_york", "America/New_York"),
            ("utc", "UTC"),
            ("Etc/GMT+5", "Etc/GMT+5"),
        ] {
            assert_eq!(calendar(Every::Day, name).time_zone(), told);
        }
        assert_eq!(
            Calendar::new(Every::Day, "Mars/Base").unwrap_err().to_string(),
            "unknown time zone `Mars/Base`: write a name of the IANA database, e.g. `Europe/Berlin` or `UTC`"
        );
        for unknown in ["", "Etc/Unknown", "+01:00", "local", "Europe", "Europe/Berlin ", "../UTC"]
        {
            assert_eq!(
                Calendar::new(Every::Day, unknown),
                Err(InvalidZone(unknown.to_owned())),
                "{unknown}"
            );
        }
    }

    #[test]
    fn units_are_written_in_lower_case() {
        for (text, every) in ["day", "week", "month", "year"].into_iter().zip(EVERY) {
            assert_eq!(serde_saphyr::from_str::<Every>(text).unwrap(), every);
            assert_eq!(serde_saphyr::to_string(&every).unwrap().trim(), text);
        }
    }

    #[test]
    fn a_day_of_23_or_25_hours_is_one_window() {
        let day = |start, end| assert_window(Every::Day, "Europe/Berlin", start, end);
        assert_eq!(day("2026-03-28T00:00+01:00", "2026-03-29T00:00+01:00"), 24 * HOUR);
        assert_eq!(day("2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"), 23 * HOUR);
        assert_eq!(day("2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"), 25 * HOUR);
    }

    #[test]
    fn a_day_without_midnight_starts_when_it_starts() {
        // The clocks went from 24:00 to 01:00.
        for (zone, start, end) in [
            ("America/Sao_Paulo", "2018-11-04T01:00-02:00", "2018-11-05T00:00-02:00"),
            ("Asia/Beirut", "2026-03-29T01:00+03:00", "2026-03-30T00:00+03:00"),
        ] {
            assert_eq!(assert_window(Every::Day, zone, start, end), 23 * HOUR);
        }
    }

    #[test]
    fn a_day_with_two_midnights_starts_at_the_first() {
        // At 01:00 the clocks went back to 00:00.
        let (start, end) = ("2026-11-01T00:00-04:00", "2026-11-02T00:00-05:00");
        assert_eq!(assert_window(Every::Day, "America/Havana", start, end), 25 * HOUR);
    }

    #[test]
    fn a_day_that_is_over_does_not_come_back() {
        // At 00:01 of the 7th the clocks went back to 23:01 of the 6th.
        let day = |start, end| assert_window(Every::Day, "America/St_Johns", start, end);
        assert_eq!(day("2010-11-06T00:00-02:30", "2010-11-07T00:00-02:30"), 24 * HOUR);
        assert_eq!(day("2010-11-07T00:00-02:30", "2010-11-08T00:00-03:30"), 25 * HOUR);
    }

    #[test]
    fn a_day_that_was_skipped_has_no_window() {
        // Samoa crossed the date line: after the 29th came the 31st.
        let day = |start, end| assert_window(Every::Day, "Pacific/Apia", start, end);
        assert_eq!(day("2011-12-29T00:00-10:00", "2011-12-31T00:00+14:00"), 24 * HOUR);
        assert_eq!(day("2011-12-31T00:00+14:00", "2012-01-01T00:00+14:00"), 24 * HOUR);
        let week = ("2011-12-26T00:00-10:00", "2012-01-02T00:00+14:00");
        assert_eq!(assert_window(Every::Week, "Pacific/Apia", week.0, week.1), 6 * DAY);
    }

    #[test]
    fn a_week_starts_on_monday() {
        let week = |start, end| assert_window(Every::Week, "UTC", start, end);
        assert_eq!(week("2026-11-16T00:00Z", "2026-11-23T00:00Z"), 7 * DAY);
        assert_eq!(week("2025-12-29T00:00Z", "2026-01-05T00:00Z"), 7 * DAY);
    }

    #[test]
    fn months_and_years_are_as_long_as_they_are() {
        let month = |start, end| assert_window(Every::Month, "Asia/Tokyo", start, end);
        assert_eq!(month("2026-01-01T00:00+09:00", "2026-02-01T00:00+09:00"), 31 * DAY);
        assert_eq!(month("2026-02-01T00:00+09:00", "2026-03-01T00:00+09:00"), 28 * DAY);
        assert_eq!(month("2028-02-01T00:00+09:00", "2028-03-01T00:00+09:00"), 29 * DAY);
        let year = |start, end| assert_window(Every::Year, "UTC", start, end);
        assert_eq!(year("2026-01-01T00:00Z", "2027-01-01T00:00Z"), 365 * DAY);
        assert_eq!(year("2028-01-01T00:00Z", "2029-01-01T00:00Z"), 366 * DAY);
        assert_eq!(year("2100-01-01T00:00Z", "2101-01-01T00:00Z"), 365 * DAY);
    }

    #[test]
    fn what_began_before_the_epoch_is_told_from_it() {
        let year = calendar(Every::Year, "America/New_York");
        assert_eq!(year.window(Duration::ZERO), (Duration::ZERO, 5 * HOUR));
        assert_eq!(year.window(5 * HOUR).0, 5 * HOUR);
    }

    #[test]
    fn no_clock_is_too_late() {
        for every in EVERY {
            let calendar = calendar(every, "Europe/Berlin");
            for wall in [Duration::from_nanos(u64::MAX), LATEST - NANO, LATEST, Duration::MAX] {
                let (start, end) = calendar.window(wall);
                assert!(start <= wall.min(LATEST) && wall.min(LATEST) < end, "{every:?} {wall:?}");
            }
        }
    }

    /// Windows from 1970 to the first of January of `until`, one by one; how many there were.
    fn walk(every: Every, zone: &str, until: &str) -> u32 {
        let (calendar, mut windows) = (calendar(every, zone), 0);
        let (mut now, until) = (Duration::ZERO, at(&format!("{until}-01-01T00:00Z")));
        while now < until {
            let (start, end) = calendar.window(now);
            assert!(start == now && start < end, "{zone} {every:?}: {start:?} {end:?}");
            assert!(end - start <= every.longest(), "{zone} {every:?}: {:?}", end - start);
            assert_eq!(calendar.window(end - NANO), (start, end), "{zone} {every:?}");
            (now, windows) = (end, windows + 1);
        }
        windows
    }

    #[test]
    fn windows_follow_each_other_without_gap_or_overlap() {
        for zone in [
            "UTC",
            "Africa/Casablanca",
            "America/Sao_Paulo",
            "America/St_Johns",
            "Asia/Beirut",
            "Asia/Kathmandu",
            "Australia/Lord_Howe",
            "Europe/Berlin",
            "Pacific/Apia",
        ] {
            for (every, until, at_least) in [
                (Every::Day, "2045", 27_393),
                (Every::Week, "2100", 6_782),
                (Every::Month, "2500", 6_360),
                (Every::Year, "2500", 530),
            ] {
                let windows = walk(every, zone, until);
                assert!((at_least..at_least + 3).contains(&windows), "{zone} {every:?}: {windows}");
            }
        }
    }

    #[test]
    fn no_zone_has_a_day_that_is_too_long_or_starts_too_late() {
        let mut changes = 0;
        for zone in TimeZoneDatabase::bundled().available() {
            let calendar = calendar(Every::Day, zone.as_str());
            let until = "2040-01-01T00:00Z".parse().unwrap();
            for change in calendar.zone.following(Timestamp::UNIX_EPOCH) {
                let change = change.timestamp();
                if change > until {
                    break;
                }
                changes += 1;
                for now in [since_epoch(change) - NANO, since_epoch(change)] {
                    let (start, end) = calendar.window(now);
                    assert!(start <= now && now < end, "{zone} {change}");
                }
                let mut now = since_epoch(change).saturating_sub(2 * DAY);
                while now < since_epoch(change) + 2 * DAY {
                    let (start, end) = calendar.window(now);
                    assert!(start <= now && now < end, "{zone} {change}");
                    assert!(end - start <= Every::Day.longest(), "{zone} {change}");
                    assert_eq!(calendar.window(end - NANO), (start, end), "{zone} {change}");
                    // Right before a day starts, it was another one.
                    let date = |wall| {
                        let time = Timestamp::UNIX_EPOCH.checked_add(wall).unwrap();
                        calendar.zone.to_datetime(time).date()
                    };
                    assert!(date(end - NANO) < date(end), "{zone} {change}");
                    now = end;
                }
            }
        }
        println!("{changes} changes of clocks");
        assert!(changes > 10_000);
    }
}
